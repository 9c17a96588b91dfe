"""Functions that a config names: loaded, or refused with the reason."""

import json

import pytest

from common.errors import UserError
from common.user_code.functions import load_function


def test_a_function_is_loaded_by_module_and_name():
    assert load_function("json:dumps", "reward source s") is json.dumps


@pytest.mark.parametrize("path", ["questions.csv", "json.dumps", "", ":f"])
def test_a_name_that_is_not_module_colon_function_is_refused(path):
    with pytest.raises(UserError) as caught:
        load_function(path, "reward source s")
    assert (
        str(caught.value) == f"reward source s ({path}) must read module:function, such as deploy.tasks.larger:correct"
    )


@pytest.mark.parametrize("path", ["no_such_module:f", "json.no_such_module:f"])
def test_a_function_in_a_module_that_is_not_there_is_refused(path):
    with pytest.raises(UserError) as caught:
        load_function(path, "prompts")
    assert f"prompts ({path}): module {path[:-2]} cannot be imported" in str(caught.value)
    assert "directory ratchet is started from" in str(caught.value)


def test_a_module_that_raises_when_imported_is_refused_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"raises_at_import cannot be imported \(RuntimeError: no licence\)"):
        load_function("raises_at_import:f", "reward source s")


@pytest.mark.parametrize("name", ["no_such_function", "__doc__", ""])
def test_a_module_without_the_function_is_refused(name):
    with pytest.raises(UserError) as caught:
        load_function(f"json:{name}", "reward source s")
    assert str(caught.value) == f"reward source s (json:{name}): module json ({json.__file__}) has no function {name}"
