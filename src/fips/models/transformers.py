"""Find, build and load transformers models and their processors, from a directory or the hub."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from fips.errors import CheckpointError, ConfigError, ModelError
from fips.files.hub import hub_where_reached
from fips.models.architectures import check_trust, config_class, model_class, plain_numbers
from fips.models.gguf import as_plain, check_tensors, gguf_fields, gguf_source, is_gguf_source
from fips.models.names import listed

__all__ = [
    "already_compressed",
    "build_empty",
    "build_from_classes",
    "build_packed",
    "config_fields",
    "config_from_fields",
    "context_length",
    "example_inputs",
    "load_config",
    "load_dense",
    "load_processor",
    "model_kind",
    "quiet",
    "reads_text_alone",
    "require_one_input",
    "resolve_dtype",
]

log = logging.getLogger(__name__)

Kind = Literal["image", "text"]
"""Layers that a configuration may always ask for; more must be in the file."""
_DTYPES = {
    "auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16", "float64": "float64",
}  # fmt: skip
_PROCESSOR_FILES: dict[str, tuple[str, ...]] = {
    "text": (
        "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
        "sentencepiece.bpe.model", "spm.model", "tekken.json",
    ),
    "image": ("preprocessor_config.json", "processor_config.json"),
    "both": ("processor_config.json", "preprocessor_config.json"),
}  # fmt: skip
_T = TypeVar("_T")


def resolve_dtype(name: str) -> str:
    """The name torch has for a type; raises ``ConfigError`` for anything but a floating type or ``auto``."""
    found = _DTYPES.get(name.removeprefix("torch."))
    if found is None:
        raise ConfigError(f"`--dtype` must be one of {', '.join(_DTYPES)}, got {name!r}")
    return found


def config_fields(source: str) -> dict[str, Any]:
    """What ``config.json`` of a local directory or hub id holds; raises ``ModelError`` if there is none.

    Of a GGUF file, what it would hold.
    """
    path = Path(source)
    if is_gguf_source(source):
        with quiet():
            return gguf_fields(gguf_source(source))
    if path.exists() and not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        advice = "give a directory written by save_pretrained"
        if files:
            advice = f"to read a GGUF file, give it: `{path / files[0]}`, or add `--gguf-file {files[0]}`"
        raise ModelError(f"`{source}` is not a model: it has no config.json; {advice}")
    if not path.exists() and _looks_like_path(source):
        raise ModelError(f"unknown model `{source}`: no such directory; give a model directory or a hub id")
    fields, _ = _from_source(source, PretrainedConfig.get_config_dict)
    return dict(fields)


def load_config(source: str, *, trust_remote_code: bool = False) -> tuple[PretrainedConfig, bool]:
    """Configuration of a local directory or hub id, and whether code that lies in it is to build the model.

    Raises ``ModelError`` if there is none, if it describes no model of transformers, or if it needs code that lies
    in the repository and ``trust_remote_code`` does not allow it.
    """
    fields = config_fields(source)
    trusted = check_trust(source, fields, trust_remote_code=trust_remote_code)
    kind = fields.get("model_type", "")
    if not trusted and "model_type" in fields and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise ModelError(f"`model_type` in config.json of `{source}` names no type of transformers: {kind!r:.80}")
    if is_gguf_source(source):
        return config_from_fields(fields, source=source), False
    try:
        with quiet(), _hub_for(source):
            return AutoConfig.from_pretrained(source, trust_remote_code=trusted), trusted
    except Exception as error:  # fields are anyone's, and each class checks them in its own way
        raise ModelError(f"`{source}`: {_wrong_field(kind, fields, error)}") from None


def config_from_fields(fields: Mapping[str, Any], *, source: str = "", trusted: bool = False) -> PretrainedConfig:
    """Configuration from ``model_type`` and its fields; raises ``ModelError`` for an unknown type or a wrong field."""
    return _configure(config_class(fields, source, trusted=trusted), fields)


def _configure(kind: type[PretrainedConfig], fields: Mapping[str, Any]) -> PretrainedConfig:
    try:
        with quiet():
            return kind.from_dict(plain_numbers(fields))
    except Exception as error:  # fields are anyone's, and each class checks them in its own way
        raise ModelError(_wrong_field(kind.__name__, fields, error)) from None


def already_compressed(source: str, how: str = "") -> ModelError:
    """The refusal of a model whose numbers are not the original's any more."""
    return ModelError(
        f"`{source}` is already compressed{how}; give the original model, or where it was trained since, what "
        "`fips export` makes of it"
    )


def load_dense(
    source: str, *, dtype: str = "auto", device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A dense model with its weights, in evaluation mode, in the checkpoint's type unless ``dtype`` names another.

    Every weight is the file's: where only tensors of the head are missing, the base model is loaded instead and a
    warning names them. Raises ``ModelError`` if other tensors are missing, or if the file cannot be read.
    """
    wanted = resolve_dtype(dtype)
    config, trusted = load_config(source, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        method = getattr(config.quantization_config, "get", lambda _: None)("quant_method") or "another method"
        raise already_compressed(source, f" ({method})")
    options = {"config": config, "dtype": wanted if wanted == "auto" else getattr(torch, wanted)}
    kind = model_class(config, source, trusted=trusted)
    if is_gguf_source(source):
        return _load_gguf(source, kind, options).to(device).eval()
    try:
        model, absent = _read_weights(source, kind, options)
    except ModelError:
        _construct(kind, config)  # says which field is wrong, where it is the configuration that is
        raise
    if absent:
        base_class = _base_class(source, model, absent)
        log.warning(
            "`%s` lacks %s, which `%s` needs: loaded as `%s`, without that head",
            source, listed(absent), type(model).__name__, base_class.__name__,
        )  # fmt: skip
        model, absent = _read_weights(source, base_class, options)
        if absent:
            raise ModelError(_lacks(source, model, absent))
    model.to(device)
    return model.eval()


def _load_gguf(source: str, kind: type[PreTrainedModel], options: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a GGUF file, every weight a floating number, as if it had been saved like any other."""
    file = gguf_source(source)
    check_tensors(build_empty(options["config"]), file)
    place, named = file.options
    options = {**options, **named, "dtype": file.dtype if options["dtype"] == "auto" else options["dtype"]}
    options_class = getattr(transformers, "GgufConfig", None)  # where weights can stay as they are in the file
    if options_class is not None:
        options["quantization_config"] = options_class(dequantize=True)
    try:
        with quiet(), _without_bar():
            model, found = kind.from_pretrained(place, output_loading_info=True, **options)
    except Exception as error:  # files are anyone's, and the reader fails in its own ways
        raise ModelError(
            f"cannot load model `{source}`: {type(error).__name__}: {_first_words(error)} (copy the file again)"
        ) from None
    wrong = sorted(found["missing_keys"])
    if wrong:
        raise ModelError(f"`{file.path.name}` lacks {listed(wrong)}, which `{kind.__name__}` needs: copy it again")
    surplus = sorted(found["unexpected_keys"])
    if surplus:
        raise ModelError(f"`{file.path.name}` holds {listed(surplus)}, for which `{kind.__name__}` has no place")
    as_plain(model)
    return model


def _read_weights(
    source: str, kind: type[PreTrainedModel], options: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """A model and the names of its tensors that the files do not hold, which then are random numbers."""
    model, found = _from_source(
        source, kind.from_pretrained, output_loading_info=True, trust_remote_code=False, **options
    )
    surplus = sorted(found["unexpected_keys"])
    if surplus and not found["missing_keys"]:
        log.warning("`%s` holds %s, for which `%s` has no place: left out", source, listed(surplus), kind.__name__)
    return model, sorted(found["missing_keys"])


def _base_class(source: str, model: PreTrainedModel, absent: Sequence[str]) -> type[PreTrainedModel]:
    """The class of the model below the head; raises ``ModelError`` if more than the head is missing."""
    prefix = f"{model.base_model_prefix}."
    base = type(model.base_model)
    if base is type(model) or any(name.startswith(prefix) for name in absent) or not issubclass(base, PreTrainedModel):
        raise ModelError(_lacks(source, model, absent))
    return base


def _lacks(source: str, model: PreTrainedModel, absent: Sequence[str]) -> str:
    return (
        f"`{source}` lacks {listed(absent)}, which `{type(model).__name__}` needs; they would be random numbers: add "
        "them to the file, or name in `architectures` of config.json a class that needs no more than the file holds"
    )


def build_empty(config: PretrainedConfig, *, source: str = "", trusted: bool = False) -> PreTrainedModel:
    """The model of a configuration, in its type, with parameters on the meta device; buffers are real.

    ``trusted`` lets the class come from the code of repository ``source``. Raises ``ModelError`` if no class fits or
    if the configuration describes no model.
    """
    return _construct(model_class(config, source, trusted=trusted), config)


def build_from_classes(
    kind: type[PreTrainedModel], config: type[PretrainedConfig], fields: Mapping[str, Any]
) -> PreTrainedModel:
    """As ``build_empty``, of classes already known and the fields of a ``config.json``."""
    return _construct(kind, _configure(config, fields))


def _construct(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    try:
        dtype = config.dtype or torch.float32
        with init_empty_weights(include_buffers=False), quiet(), _default_dtype(dtype):
            model = kind(config)
        model.tie_weights()  # the context above gives every name a parameter of its own
    except Exception as error:  # fields are anyone's, and each class fails in its own way
        raise ModelError(_wrong_field(kind.__name__, config.to_dict(), error)) from None
    return model.eval()


def build_packed(directory: Path, fields: Mapping[str, Any], *, trust_remote_code: bool) -> PreTrainedModel:
    """The dense model, without weights, that a packed directory with these fields of ``config.json`` was made from.

    Raises ``CheckpointError`` naming the file if the fields describe none, ``ModelError`` if it needs code that is
    not trusted.
    """
    source = str(directory)
    trusted = check_trust(source, fields, trust_remote_code=trust_remote_code, packed=True)
    try:
        config = config_from_fields(fields, source=source, trusted=trusted)
        return build_empty(config, source=source, trusted=trusted)
    except ModelError as error:
        raise CheckpointError(f"`{directory / 'config.json'}`: {error}") from None


def _wrong_field(name: str, fields: Mapping[str, Any], error: Exception) -> str:
    """What to say of a configuration from which ``name`` cannot be made, with the fields that the error speaks of."""
    text = " ".join(str(error).split())
    spoken = [
        key
        for key, value in fields.items()
        if re.search(rf"\b{re.escape(key)}\b", text) or (isinstance(value, str) and value and value in text)
    ]
    where = f" ({', '.join(f'`{key}`' for key in spoken[:3])})" if spoken else ""
    return f"config.json describes no `{name}`{where}: {type(error).__name__}: {text[:200]}"


def model_kind(model: nn.Module) -> Kind:
    """What a model reads, from its main input; raises ``ModelError`` if it is neither images nor text."""
    name = getattr(model, "main_input_name", None)
    if name == "pixel_values":
        return "image"
    if name == "input_ids":
        return "text"
    raise ModelError(
        f"`{type(model).__name__}` reads `{name}`; the command line handles images and text, Python any batch"
    )


def require_one_input(model: PreTrainedModel) -> None:
    """Raise ``ModelError`` if a text or an image alone is no example for the model: CLIP wants both, T5 two texts."""
    kinds = model.input_modalities
    needs = f"{' and '.join(kinds)} together" if isinstance(kinds, tuple | list) and len(kinds) > 1 else ""
    if needs and model.can_generate():
        needs = ""  # a language model that can see also reads text alone
    if not needs and getattr(model.config, "is_encoder_decoder", False) and not reads_text_alone(model):
        needs = "a text for its decoder beside the one it reads"
    if needs:
        raise ModelError(
            f"`{type(model).__name__}` needs {needs}, which the command line cannot give; in Python any batch can be "
            "given to `fips.compress`"
        )


def reads_text_alone(model: PreTrainedModel) -> bool:
    """Whether an encoder-decoder makes up the tokens of its decoder, tried on the meta device."""
    try:
        with torch.device("meta"), torch.no_grad():
            twin = type(model)(model.config)
            twin(input_ids=torch.ones(1, 4, dtype=torch.long))
    except Exception:  # whatever a model says that lacks an input
        return False
    return True


def context_length(config: PretrainedConfig) -> int | None:
    """Longest sequence a text model was made for."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int):
            return value
    return None


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Made-up inputs of the shape a model takes: two noise images, or two sequences of random tokens."""
    generator = torch.Generator().manual_seed(0)
    if model_kind(model) == "text":
        config = model.config.get_text_config()
        length = min(context_length(config) or 16, 16)
        return {"input_ids": torch.randint(config.vocab_size, (2, length), generator=generator)}
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (2, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def load_processor(source: str, kind: Literal["image", "text", "both"], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor or what is both, stored with a model; None if there are no files of one.

    Raises ``ModelError`` if there are and they cannot be used.
    """
    what = {"text": "tokenizer", "image": "image processor", "both": "processor of images and texts"}[kind]
    if is_gguf_source(source):
        return _tokenizer_of_gguf(source) if kind == "text" else None
    if not any(_holds(source, name) for name in _PROCESSOR_FILES[kind]):
        return None
    loaders = {
        "text": transformers.AutoTokenizer,
        "image": transformers.AutoImageProcessor,
        "both": transformers.AutoProcessor,
    }
    load = loaders[kind]
    try:
        with quiet(), _hub_for(source):
            processor = load.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # files are anyone's, and each class fails in its own way
        advice = "repair it, or remove its files to go without"
        if "trust_remote_code" in str(error):
            advice = "it is built by code in the repository: read that, then allow it with --trust-remote-code"
        raise ModelError(
            f"the {what} of `{source}` cannot be used: {type(error).__name__}: {_first_words(error)}; {advice}"
        ) from None
    files = set(getattr(processor, "vocab_files_names", {}).values()) if kind == "text" else set()
    if files and not any(_holds(source, name) for name in files | {"tokenizer.json", "tokenizer.model"}):
        raise ModelError(f"the tokenizer of `{source}` has no vocabulary ({', '.join(sorted(files))}); copy it again")
    return processor


def _tokenizer_of_gguf(source: str) -> Any:
    """The tokenizer in a GGUF file."""
    place, options = gguf_source(source).options
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # vocabularies are anyone's, and each kind fails in its own way
        raise ModelError(
            f"the tokenizer in `{source}` cannot be used: {type(error).__name__}: {_first_words(error)}; give the "
            "original model"
        ) from None


def _holds(source: str, name: str) -> bool:
    """Whether a directory, or a repository as far as it can be reached, holds a file."""
    if Path(source).is_dir():
        return (Path(source) / name).is_file()
    try:
        with quiet(), hub_where_reached():
            return cached_file(source, name, _raise_exceptions_for_missing_entries=False) is not None
    except OSError:
        return False


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or (os.sep != "/" and os.sep in source)


def _hub_for(source: str) -> AbstractContextManager[None]:
    """What a model is read in that may have to be fetched."""
    return nullcontext() if Path(source).is_dir() else hub_where_reached()


def _from_source(source: str, load: Callable[..., _T], **options: Any) -> _T:
    try:
        with quiet(), _hub_for(source):
            return load(source, **options)
    except Exception as error:  # whatever readers of damaged files and foreign fields may raise
        name = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        words = f"{name}{_first_words(error)}"
        if not Path(source).is_dir():
            raise ModelError(
                f"cannot load model `{source}`: there is no directory of this name; give one, or a hub id while online "
                f"(as a hub id: {words})"
            ) from None
        advice = "copy the directory again"
        if any(Path(source).glob("*.bin")) and not any(Path(source).glob("*.safetensors")):
            advice = "its weights are pickled: write them anew with save_pretrained, which uses safetensors"
        raise ModelError(f"cannot load model `{source}`: {words} ({advice})") from None


def _first_words(error: Exception) -> str:
    """The first sentences of an error, as many as 200 characters hold; one that is longer is cut."""
    text = " ".join(str(error).split())
    end = text.rfind(". ", 0, 200)
    return text if len(text) <= 200 else text[:end] if end > 0 else f"{text[:200]}..."


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without the bar over the tensors of a GGUF file, which asks nobody whether it may be drawn."""
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    before = module.tqdm
    module.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        module.tqdm = before


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of transformers and the hub client, which would mix with ours."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
