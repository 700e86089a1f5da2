"""The engine's configuration is checked when it is made."""

import pytest

from tokenmill.config import EngineConfig
from tokenmill.errors import UsageError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization", "q3"),
        ("activations", "fp8"),
        ("kv_cache", "q4"),
        ("threads", 0),
        ("threads", 1025),
        ("max_model_len", 1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", True),
        ("kv_cache_memory_bytes", -5),
        ("max_waiting", -1),
        ("speculative", ""),
        ("num_speculative_tokens", 0),
        ("model", ""),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{field} is ") as caught:
        EngineConfig(**{field: value})
    assert "\n" not in str(caught.value)
