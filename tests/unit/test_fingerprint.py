from tokenmill import fingerprint


def test_every_edit_gives_another_fingerprint(monkeypatch, tmp_path):
    def fingerprint_of(*folders: str) -> str:
        fingerprint.code_fingerprint.cache_clear()
        return fingerprint.code_fingerprint(*folders)

    monkeypatch.setattr(fingerprint, "_PACKAGE", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "ir").mkdir()
    seen = {fingerprint_of("models")}
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        (tmp_path / "models" / f"{name}.py").write_text(text)
        seen.add(fingerprint_of("models"))
    assert len(seen) == 4
    (tmp_path / "ir" / "c.py").write_text("3")
    assert fingerprint_of("models") in seen
    assert fingerprint_of("models", "ir") not in seen
    fingerprint.code_fingerprint.cache_clear()
