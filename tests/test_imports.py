"""``import fips`` and ``fips --help`` import neither torch nor transformers; all else works whoever imports first."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from fresh import python
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fips
from fips.errors import MissingPackageError
from fips.optional import require
from fips.registration import METHOD, TOLD, Finder, register_when_imported
from fips.storage.layout import QUANT_METHOD
from fips.storage.quantizer import FipsConfig, FipsHfQuantizer

PACKED = Path(__file__).parent / "fixtures" / "format-3-levels"
HEAVY = ("torch", "transformers", "datasets", "numpy", "peft")
LOAD = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(PACKED)!r})
packed = [name for name, module in model.named_modules() if type(module).__name__ == "FactoredLinear"]
assert packed, model
"""
PEFT = """
from peft import LoraConfig, get_peft_model
found = [name for name, _ in get_peft_model(model, LoraConfig(target_modules=["up_proj"])).named_parameters()]
assert any("lora_A" in name for name in found), found
"""
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra peft is not installed")


def fresh(code: str, *arguments: object) -> str:
    """What code prints in an interpreter where nothing was imported; fails with what it says on stderr."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import fips",
        "import fips; dir(fips), fips.errors.BudgetError",
        "from fips.cli import main; main(['--help'])",
        "from fips.cli import main; main(['compress', '--help'])",
        "from fips.cli import main; main(['--version'])",
        "import os; os.environ.update(_FIPS_COMPLETE='complete_bash', COMP_WORDS='fips comp', COMP_CWORD='1')\n"
        "from fips.cli import main; main([])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    """Neither prints anything but what was asked for."""
    seen = f"import atexit, sys\natexit.register(lambda: print('HEAVY', [n for n in {HEAVY} if n in sys.modules]))\n"
    out = fresh(seen + code)
    assert out.splitlines()[-1] == "HEAVY []"
    assert ("import fips" in code) == (out == "HEAVY []\n"), "import prints nothing, commands do"


def test_every_public_name_is_there() -> None:
    assert set(fips.__all__) <= set(dir(fips))
    for name in fips.__all__:
        namespace: dict[str, object] = {}
        exec(f"from fips import {name}", namespace)
        assert namespace[name] is getattr(fips, name)
    assert callable(fips.compress)
    with pytest.raises(AttributeError, match="nonsense"):
        fips.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        exec("from fips import nonsense")


def test_type_checkers_see_the_names_where_they_are() -> None:
    tree = ast.parse(Path(fips.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == fips._HOMES
    assert set(fips.__all__) - set(seen) == {"FipsError", "__version__"}
    assert (Path(fips.__file__).parent / "py.typed").is_file()


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """Importing ``fips.x`` sets the attribute ``x`` of the package, whatever stands there."""
    names = {path.stem for path in Path(fips.__file__).parent.iterdir()}
    assert not names & set(fips.__all__)


def test_the_method_has_the_name_that_files_have() -> None:
    assert METHOD == QUANT_METHOD
    assert callable(AUTO_QUANTIZER_MAPPING[METHOD])
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD].from_dict == FipsConfig.from_dict
    config = FipsConfig.from_dict(AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD].from_dict(_layout()).to_dict())
    assert isinstance(AUTO_QUANTIZER_MAPPING[METHOD](config, pre_quantized=True), FipsHfQuantizer)


def _layout() -> dict[str, object]:
    import json

    fields: dict[str, object] = json.loads((PACKED / "config.json").read_text())["quantization_config"]
    return fields


@pytest.mark.parametrize("name", TOLD)
def test_registering_again_changes_nothing(name: str) -> None:
    """As ``importlib.reload(fips)`` does."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip("not installed")
    importlib.import_module(name)
    for _ in range(2):
        register_when_imported()
    assert [type(finder) for finder in sys.meta_path].count(Finder) == 1
    if name.startswith("peft"):
        module = sys.modules[name]
        model = getattr(module, "LoraModel", None)
        told = module._maybe_include_all_linear_layers if model is None else model._create_new_module
        assert told.knows_fips
        assert not any(getattr(cell.cell_contents, "knows_fips", False) for cell in told.__closure__)


BEFORE = {
    "fips, then transformers": f"import fips\n{LOAD}",
    "fips, then transformers in threads": (
        "import fips, threading\n"
        "errors = []\n"
        "def load():\n"
        "    try:\n"
        "        import transformers.modeling_utils, transformers.quantizers.auto as auto\n"
        "        assert 'fips' in auto.AUTO_QUANTIZER_MAPPING\n"
        "    except BaseException as error:\n"
        "        errors.append(error)\n"
        "threads = [threading.Thread(target=load) for _ in range(4)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        f"assert not errors, errors\n{LOAD}"
    ),
    "fips, loaded by fips, then by transformers": f"import fips\nfips.load({str(PACKED)!r})\n{LOAD}",
}
AFTER = {
    "transformers, then fips": f"import fips\n{LOAD}",
    "a module of transformers that imports late, then fips": f"import transformers.quantizers.auto, fips\n{LOAD}",
    "fips reloaded": f"import importlib, fips\nimportlib.reload(fips)\n{LOAD}",
    "transformers reloaded": (
        "import importlib, fips, transformers.quantizers.auto as auto\n"
        "importlib.reload(auto)\nassert 'fips' in auto.AUTO_QUANTIZER_MAPPING\n"
    ),
    "trust_remote_code, no import": LOAD.replace(")\n", ", trust_remote_code=True)\n", 1),
    "a name first": f"from fips import CompressionConfig\nCompressionConfig(bits=4)\n{LOAD}",
    "settings alone": "from fips.config import CompressionConfig\nassert CompressionConfig(bits=4).method == 'fips'",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", BEFORE)
def test_packed_models_load_where_transformers_comes_later(order: str) -> None:
    done = python(BEFORE[order], imported="torch")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("order", AFTER)
def test_packed_models_load_where_transformers_came_first(order: str) -> None:
    done = python(AFTER[order])
    assert done.returncode == 0, done.stderr[-3000:]


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("first", ["import peft, fips", "import fips, peft", "import fips"])
def test_adapters_know_packed_layers_in_any_order(first: str) -> None:
    done = python(f"{first}\n{LOAD}{PEFT}")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_pickled_model_is_all_a_process_needs(tmp_path: Path) -> None:
    model = fips.load(PACKED)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    ids = torch.arange(6)[None]
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    code = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "ids, expected = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(model(ids).logits, expected)\n"
        "model.save_pretrained(sys.argv[3])\n"
    ) + LOAD.replace(repr(str(PACKED)), "sys.argv[3]")
    done = python(code, tmp_path / "model.pickle", tmp_path / "expected.pt", tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_library_that_is_made_otherwise_is_imported_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "strange.py").write_text("NOTHING = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TOLD, "strange", TOLD["transformers.quantizers.auto"])
    with caplog.at_level("WARNING", logger="fips"):
        assert importlib.import_module("strange").NOTHING == 1
    assert "`strange` cannot be told of packed layers" in caplog.text
    sys.modules.pop("strange")


def test_an_optional_package_that_lacks_another_is_told_apart_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfway.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"`halfway`, which cannot be .*: install `not_there_at_all`$"):
        require("halfway", extra="half", purpose="a test")
    with pytest.raises(MissingPackageError, match=r"`not_there_at_all` .*`pip install 'fips\[half\]'`"):
        require("not_there_at_all.part", extra="half", purpose="a test")


def test_data_is_loaded_for_a_model_and_scores_it(tmp_path: Path) -> None:
    from fips.demo.run import MODEL_DIRECTORY

    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, num_hidden_layers=1)
    data = fips.load_data(str(tmp_path / "text.txt"), model, num_samples=4, sequence_length=16)
    assert [batch["input_ids"].shape for batch in data] == [(4, 16)]
    scored = fips.load_data(str(tmp_path / "text.txt"), model, purpose="evaluation", sequence_length=64)
    result = fips.evaluate(model, scored, against=model)
    assert result.perplexity > 1
    assert result.against is not None
    assert result.against.kl == 0
    fips.compress(model, data, fips.CompressionConfig(bits=6.0, effort="fast"))
    fips.save(model, tmp_path / "small", processor=AutoTokenizer.from_pretrained(MODEL_DIRECTORY))
    loaded = fips.load(tmp_path / "small")
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "small")
    again = fips.load_data(str(tmp_path / "text.txt"), loaded, num_samples=4, sequence_length=16)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, data, strict=True))
    with pytest.raises(fips.FipsError, match="num_sample"):
        fips.load_data(str(tmp_path / "text.txt"), model, num_sample=4)
    with pytest.raises(fips.FipsError, match="`purpose` must be"):
        fips.load_data(str(tmp_path / "text.txt"), model, purpose="training")  # type: ignore[arg-type]
    with pytest.raises(fips.FipsError, match="tokenizer"):
        fips.load_data(str(tmp_path / "text.txt"), tiny_model("llama"))
