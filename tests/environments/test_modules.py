"""Modules that an environment imports are the same in all of its processes."""

import importlib
import shutil
import sys

import pytest

from RL2.environments.modules import Remembered, imported_since


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """A package, a namespace and a module, as they were kept; their files are gone."""
    (tmp_path / "em_package").mkdir()
    (tmp_path / "em_package/__init__.py").write_text("from em_package.inner import value\n")
    (tmp_path / "em_package/inner.py").write_text("value = __file__\n")
    (tmp_path / "em_space").mkdir()
    (tmp_path / "em_space/part.py").write_text("# latin-1: \xe9\nvalue = 2\n", "utf-8")
    (tmp_path / "em_alone.py").write_text("import colorsys, em_space.part\nvalue = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {*sys.modules}
    for name in ("em_package", "em_alone"):
        importlib.import_module(name)
    kept = imported_since(before)
    for name in {*sys.modules} - before:
        del sys.modules[name]
    shutil.rmtree(tmp_path)
    importlib.invalidate_caches()
    finder = Remembered(kept)
    sys.meta_path.insert(0, finder)
    yield kept
    sys.meta_path.remove(finder)
    for name in {*sys.modules} - before:
        del sys.modules[name]


def test_modules_of_ones_own_are_kept(remembered):
    parts = {"em_package.inner", "em_space.part"}
    assert {*remembered} == {"em_package", "em_space", "em_alone"} | parts


def test_they_are_found_without_their_files(remembered, tmp_path):
    import em_alone
    import em_package
    import em_space.part

    assert em_package.value == str(tmp_path / "em_package/inner.py")
    assert (em_alone.value, em_space.part.value) == (3, 2)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("em_package.nothing")
