"""FileCheck on strings: what a pass or a lowering gives, checked by patterns next to the test."""

from contextlib import redirect_stderr
from io import StringIO

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts


def check(text: str, pattern: str) -> None:
    """Fail the test unless `text` has what the CHECK lines of `pattern` ask for, in order."""
    options = Options("pattern")
    message = StringIO()
    with redirect_stderr(message):
        parser = Parser(options, StringIO(pattern), *pattern_for_opts(options))
        code = Matcher(options, FInput("text", text), parser).run()
    if code != 0:
        pytest.fail(f"{message.getvalue()}\n{text}", pytrace=False)
