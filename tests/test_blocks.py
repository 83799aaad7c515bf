"""Whole blocks of a decoder in one call: what the modules give, and everything else left to those."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DECODER, FAMILIES, batches_for, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import fips
from fips.errors import BackendError
from fips.kernels import block, cpu
from fips.kernels.block import Block
from fips.layers.blocks import MARK, TRIES, forget_blocks, quicken_blocks
from fips.layers.cache import Growing, GrowingLayer
from fips.layers.linear import FactoredLinear

pytestmark = pytest.mark.skipif(not cpu.vectors(), reason="no compiled library, or no kernel for this machine")

LAYERS = DECODER["num_hidden_layers"]
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **DECODER},
    "gemma": {"architectures": ["GemmaForCausalLM"], **DECODER, "head_dim": 8},
    "exaone4": {
        "architectures": ["Exaone4ForCausalLM"], **DECODER, "sliding_window": None,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], **DECODER},
    "granite": {"architectures": ["GraniteForCausalLM"], **DECODER, "residual_multiplier": 0.9},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], **DECODER, "no_rope_layers": [1, 0, 1]},
}  # fmt: skip
HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None}),
    "phi4 mini": ("phi3", {"head_dim": 16, "rope_parameters": HALF_TURNED}),
}


def packed(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    family, variant = VARIANTS.get(family, (family, {}))
    FAMILIES.setdefault(family, OTHERS.get(family, {}))
    changes = {"initializer_range": 0.2, **variant, **changes}
    model = tiny_model(family, **changes)  # so that blocks add more than they are given
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # biases and norms of a new model are all alike
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    model = model.to(dtype)
    fips.compress(model, batches_for(model), fips.CompressionConfig(method="gptq", bits=5.5))
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return packed()


@pytest.fixture
def model(llama: Any) -> Any:
    return copy.deepcopy(llama)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Examples of every block that was made in one call."""
    found: list[int] = []
    run = Block.run

    def counted(self: Block, x: Tensor, *more: Any) -> Tensor:
        found.append(x.shape[0])
        return run(self, x, *more)

    monkeypatch.setattr(Block, "run", counted)
    return found


@contextmanager
def by_modules(model: nn.Module) -> Iterator[None]:
    """Inside, the modules of the blocks are called."""
    marks = {module: vars(module)[MARK] for module in model.modules() if MARK in vars(module)}
    forget_blocks(model)
    yield
    for module, mark in marks.items():
        setattr(module, MARK, mark)


def text(examples: int = 1, length: int = 7) -> Tensor:
    return torch.randint(3, 64, (examples, length), generator=torch.Generator().manual_seed(examples + length))


def generate(model: Any, examples: int = 1, tokens: int = 8, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            text(examples), max_new_tokens=tokens, do_sample=False, output_logits=True, eos_token_id=None,
            return_dict_in_generate=True, pad_token_id=0, **options,
        )  # fmt: skip


def logits(found: Any) -> Tensor:
    return torch.stack(found.logits, dim=1).float()


def assert_alike(found: Tensor, expected: Tensor) -> None:
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 2e-3


def warm(model: Any, examples: int = 1) -> None:
    """Past the tokens in which blocks find out."""
    generate(model, examples, tokens=4)


KNOWN = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "exaone4", "olmo2", "phi3",
    "phi4 mini",
]  # fmt: skip


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("family", KNOWN)
def test_a_block_gives_what_its_modules_give(family: str, examples: int, calls: list[int]) -> None:
    model = packed(family)
    warm(model, examples)
    calls.clear()
    found = generate(model, examples)
    assert calls == [examples] * (7 * LAYERS)
    with by_modules(model):
        expected = generate(model, examples)
    assert torch.equal(found.sequences, expected.sequences)
    assert_alike(logits(found), logits(expected))
    for mine, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == 7 + 7
        assert_alike(mine.keys, theirs.keys)
        assert_alike(mine.values, theirs.values)


@pytest.mark.parametrize("window", [5, 9, 12, 64])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_windows_slide_over_the_room_of_a_cache(
    family: str, window: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the window is full, transformers gives a mask that hides nothing."""
    monkeypatch.setattr(Growing, "LEAST", 3)
    model = packed(family, sliding_window=window)
    warm(model, 2)
    calls.clear()
    found = generate(model, 2, tokens=15)
    assert calls == [2] * (14 * LAYERS)
    with by_modules(model):
        expected = generate(model, 2, tokens=15)
    assert torch.equal(found.sequences, expected.sequences)
    assert_alike(logits(found), logits(expected))
    kept = []
    for mine, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == 7 + 14
        assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        assert_alike(mine.keys, theirs.keys)
        assert_alike(mine.values, theirs.values)
        kept.append(mine.keys.shape[2])
    assert min(kept) == min(21, window - 1)


@pytest.mark.parametrize("window", [9, 64])
def test_a_window_that_may_be_taken_back_is_left_to_transformers(window: int, calls: list[int]) -> None:
    model = packed("mistral", sliding_window=window)
    warm(model)
    calls.clear()
    found = generate(model, tokens=12, prompt_lookup_num_tokens=2)
    assert calls == []
    with by_modules(model):
        assert torch.equal(found.sequences, generate(model, tokens=12, prompt_lookup_num_tokens=2).sequences)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "olmo2", "phi3"])
def test_padding_in_front_of_texts_is_left_out(family: str, mode: Any, calls: list[int]) -> None:
    model = packed(family, **({"sliding_window": 9} if family in ("mistral", "gemma2", "gemma3_text") else {}))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = mask[2, :1] = 0
    with mode():
        warm(model, 3)
        calls.clear()
        found = generate(model, 3, tokens=12, attention_mask=mask)
        assert calls == [3] * (11 * LAYERS)
        with by_modules(model):
            expected = generate(model, 3, tokens=12, attention_mask=mask)
        other = generate(model, 3, tokens=12)
    assert torch.equal(found.sequences, expected.sequences)
    assert_alike(logits(found), logits(expected))
    assert float((logits(other)[0] - logits(expected)[0]).norm() / logits(expected)[0].norm()) > 0.1


def test_blocks_find_out_beside_padding_too(calls: list[int]) -> None:
    model = packed()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    found = generate(model, 2, attention_mask=mask)
    assert len(calls) >= 5 * LAYERS
    with by_modules(model):
        assert_alike(logits(found), logits(generate(model, 2, attention_mask=mask)))


def test_inference_mode_and_texts_of_one_token(model: Any, calls: list[int]) -> None:
    one = text(length=1)
    for _ in range(2 * TRIES):
        with torch.no_grad():
            model(one, past_key_values=DynamicCache(config=model.config))
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            warm(model)
            calls.clear()
            cache = model(text()).past_key_values
            found = model(one, past_key_values=cache).logits
            assert len(calls) == LAYERS
            with by_modules(model):
                assert_alike(found, model(one, past_key_values=model(text()).past_key_values).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_attention_that_is_computed_step_by_step(family: str, calls: list[int]) -> None:
    model = packed(family)
    warm(model)
    model.set_attn_implementation("eager")
    warm(model)
    calls.clear()
    found = generate(model)
    assert len(calls) == 7 * LAYERS
    with by_modules(model):
        assert_alike(logits(found), logits(generate(model)))


def test_half_precision_too(calls: list[int]) -> None:
    model = packed(dtype=torch.float16)
    warm(model)
    assert calls
    found = generate(model)
    with by_modules(model):
        assert_alike(logits(found), logits(generate(model)))


def test_activations_are_told_apart_and_their_ends_are_right() -> None:
    for name, one in block.ACTIVATIONS.items():
        for dtype in (torch.bfloat16, torch.float16):
            assert block.activation_of(one, dtype) == name
    assert block.activation_of(torch.nn.functional.gelu, torch.bfloat16) is None
    assert block.activation_of(torch.relu, torch.float16) is None
    assert block.activation_of(nn.Embedding(3, 3), torch.float16) is None


@pytest.mark.parametrize(("family", "made"), [("granite", 0), ("smollm3", 2)])
def test_a_block_that_computes_something_else_is_left_alone(family: str, made: int, calls: list[int]) -> None:
    model = packed(family)
    for _ in range(TRIES):
        warm(model)
    calls.clear()
    found = generate(model)
    assert len(calls) == made * 7
    with by_modules(model):
        assert_alike(logits(found), logits(generate(model)))
    assert len(calls) == made * 7


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm", ""])
def test_a_forward_that_was_changed_is_found_by_trying(
    model: Any, part: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(model.model.layers[0].get_submodule(part))
    own = kind.forward

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        y = own(self, *inputs, **options)
        return (y[0] * 0.99, *y[1:]) if isinstance(y, tuple) else y * 0.99

    monkeypatch.setattr(kind, "forward", forward)
    for _ in range(TRIES):
        warm(model)
    calls.clear()
    generate(model)
    assert calls == []


def test_hooks_of_every_module_are_called(model: Any, calls: list[int]) -> None:
    warm(model)
    layer = model.model.layers[1]
    for module in layer.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            calls.clear()
            heard: list[nn.Module] = []
            hook = register(lambda module, *_, heard=heard: heard.append(module))
            generate(model, tokens=4)
            hook.remove()
            assert len(heard) == 4
            assert len(calls) == 3 * (LAYERS - 1)
    calls.clear()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    generate(model, tokens=4)
    hook.remove()
    assert calls == []
    generate(model, tokens=4)
    assert len(calls) == 3 * LAYERS


def test_a_module_with_a_forward_of_its_own_is_called(model: Any, calls: list[int]) -> None:
    heard: list[int] = []
    for layer in model.model.layers[:2]:
        own = layer.mlp.up_proj.forward
        layer.mlp.up_proj.forward = lambda x, own=own: heard.append(1) or own(x)
    for _ in range(TRIES):
        warm(model)
    heard.clear()
    calls.clear()
    generate(model)
    assert len(heard) == 8 * 2
    assert len(calls) == 7 * (LAYERS - 2)


def test_what_the_model_is_asked_to_record_is_there(model: Any, calls: list[int]) -> None:
    warm(model)
    calls.clear()
    wanted = {"output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        found = model(text(length=1), past_key_values=model(text()).past_key_values, **wanted)
        with by_modules(model):
            expected = model(text(length=1), past_key_values=model(text()).past_key_values, **wanted)
    assert len(found.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_alike(mine, theirs)
    assert calls == []


def test_hooks_that_transformers_leaves_behind_are_no_reason_to_call_the_modules(model: Any, calls: list[int]) -> None:
    warm(model)
    with torch.no_grad():
        model(text(), output_hidden_states=True, output_attentions=True)
    assert any(one._forward_hooks for one in model.modules())
    calls.clear()
    found = generate(model)
    assert len(calls) == 7 * LAYERS
    with by_modules(model):
        assert_alike(logits(found), logits(generate(model)))
    other = copy.deepcopy(model)  # one that finds out when the hooks are there
    warm(other)
    calls.clear()
    generate(other)
    assert len(calls) == 7 * LAYERS
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)  # beside those
    calls.clear()
    generate(model)
    handle.remove()
    assert len(calls) == 7 * (LAYERS - 1)


def _scales(layer: Any) -> None:
    layer.mlp.up_proj.scales.mul_(2)


def _norm(layer: Any) -> None:
    layer.input_layernorm.weight.mul_(-1)


def _values(layer: Any) -> None:
    layer.self_attn.q_proj.values = layer.self_attn.q_proj.values.roll(1)


def _written(layer: Any) -> None:
    layer.self_attn.v_proj.values.copy_(layer.self_attn.v_proj.values.roll(3))


def _bias(layer: Any) -> None:
    layer.mlp.down_proj.bias = nn.Parameter(torch.randn(32).bfloat16())


def _exchanged(layer: Any) -> None:
    layer.self_attn.o_proj = copy.deepcopy(layer.self_attn.o_proj)
    layer.self_attn.o_proj.scales.mul_(3)


def _own_forward(layer: Any) -> None:
    layer.mlp.forward = lambda x: 2 * x


def _epsilon(layer: Any) -> None:
    layer.post_attention_layernorm.variance_epsilon = 0.5


def _scaling(layer: Any) -> None:
    layer.self_attn.scaling = 2.0


def _activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def _policy(layer: Any) -> None:
    layer.mlp.gate_proj.runtime.activation_bits = 16


def _added(layer: Any) -> None:
    layer.self_attn.q_norm = nn.Identity()


CHANGES = [
    _scales, _norm, _values, _written, _bias, _exchanged, _own_forward, _epsilon, _scaling, _activation, _policy,
    _added,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_counts(model: Any, change: Callable[[Any], None]) -> None:
    warm(model)
    before = generate(model)
    with torch.no_grad():
        change(model.model.layers[1])
    with by_modules(model):
        expected = generate(model)
    if change not in (_policy, _added):
        assert float((logits(before) - logits(expected)).norm()) > 0
    for _ in range(3):
        assert_alike(logits(generate(model)), logits(expected))


def test_threads_are_those_of_now(model: Any, calls: list[int]) -> None:
    warm(model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        warm(model)
        calls.clear()
        found = generate(model)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 7 * LAYERS
    assert_alike(logits(found), logits(generate(model)))


def test_other_calls_go_to_the_modules(model: Any, calls: list[int]) -> None:
    warm(model)
    calls.clear()
    one = text(length=1)

    def ask(options: dict[str, Any]) -> Any:
        return model(one, **{"past_key_values": model(text()).past_key_values, **options})

    with torch.no_grad():
        mask = torch.ones(1, 8, dtype=torch.long)
        mask[0, 3] = 0
        ask({"attention_mask": mask})
        ask({"past_key_values": DynamicCache(config=model.config)})  # the first token of a text
        static = StaticCache(config=model.config, max_cache_len=32)
        model(text(), past_key_values=static)
        ask({"past_key_values": static, "position_ids": torch.tensor([[7]])})
        with torch.autocast("cpu", torch.bfloat16):
            ask({})
        model.set_attn_implementation("eager")
        ask({})
        model.set_attn_implementation("sdpa")
    ask({})  # with gradients
    assert calls == []
    with torch.no_grad():
        ask({})
    assert len(calls) == LAYERS


def test_gradients_and_checkpointing_are_transformers(model: Any, calls: list[int]) -> None:
    warm(model)
    calls.clear()
    fips.prepare_qat(model)
    model.train()
    model.gradient_checkpointing_enable()
    computed: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: computed.append(1))
    model(text(), labels=text(), use_cache=False).loss.backward()
    assert len(computed) == 2  # once more on the way back
    assert calls == []


def test_compiled_and_traced_models_are_the_modules(model: Any, calls: list[int]) -> None:
    warm(model)
    calls.clear()
    with torch.no_grad():
        cache = model(text()).past_key_values
        expected = model(text(length=1), past_key_values=copy.deepcopy(cache)).logits
        assert len(calls) == LAYERS
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(text(length=1), past_key_values=copy.deepcopy(cache)).logits
    assert len(calls) == LAYERS
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 0.03  # torch rounds elsewhere


def test_beams_and_copies_of_a_cache(model: Any, calls: list[int]) -> None:
    warm(model)
    calls.clear()
    with torch.no_grad():
        found = model.generate(
            text(), num_beams=3, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert len(calls) > 3 * LAYERS
        with by_modules(model):
            expected = model.generate(
                text(), num_beams=3, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert torch.equal(found, expected)
        cache = model(text()).past_key_values
        model(text(length=1), past_key_values=cache)
        other = copy.deepcopy(cache)
        assert isinstance(other.layers[0], GrowingLayer)
        first = model(torch.tensor([[5]]), past_key_values=cache).logits
        model(torch.tensor([[9]]), past_key_values=other)
        assert torch.equal(cache.layers[0].keys[:, :, :8], other.layers[0].keys[:, :, :8])
        assert not torch.equal(cache.layers[0].keys[:, :, 8], other.layers[0].keys[:, :, 8])
        cache.crop(-1)
        assert torch.equal(model(torch.tensor([[5]]), past_key_values=cache).logits, first)


def test_a_cache_grows_past_its_room_and_takes_several_tokens_between(
    model: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Growing, "LEAST", 3)
    warm(model)
    calls.clear()

    def ask() -> list[Tensor]:
        cache = model(text()).past_key_values
        found = []
        for length in (1, 1, 1, 1, 1, 4, 1, 1):
            found.append(model(text(length=length), past_key_values=cache).logits[:, -1])
        cache.reset()
        found.append(model(text(), past_key_values=cache).logits[:, -1])
        found.append(model(text(length=1), past_key_values=cache).logits[:, -1])
        return found

    with torch.no_grad():
        found = ask()
        assert len(calls) == 8 * LAYERS
        with by_modules(model):
            expected = ask()
    for mine, theirs in zip(found, expected, strict=True):
        assert_alike(mine, theirs)


def test_keys_that_were_shown_stay_what_they_were(model: Any) -> None:
    warm(model)
    with torch.no_grad():
        cache = model(text()).past_key_values
        model(text(length=1), past_key_values=cache)
        shown, before = cache.layers[0].keys, cache.layers[0].keys.clone()
        cache.crop(-2)
        model(torch.tensor([[9]]), past_key_values=cache)
    assert torch.equal(shown, before)


def test_copies_and_files_find_out_for_themselves(model: Any, calls: list[int], tmp_path: Path) -> None:
    warm(model)
    fips.save(model, tmp_path / "saved")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fips.load(tmp_path / "saved")):
        warm(other)
        calls.clear()
        found = logits(generate(other))
        assert len(calls) == 7 * LAYERS
        with by_modules(other):
            assert_alike(found, logits(generate(other)))


def test_a_merged_model_is_forgotten(model: Any, calls: list[int]) -> None:
    warm(model)
    calls.clear()
    fips.merge(model)
    generate(model)
    assert calls == []
    assert not any(MARK in vars(module) for module in model.modules())


def test_blocks_with_a_dense_matrix_are_not_marked() -> None:
    model = tiny_model("llama").bfloat16()
    fips.compress(model, batches_for(model), fips.CompressionConfig(method="gptq", bits=5.5, layers="mlp"))
    assert not any(MARK in vars(module) for module in model.modules())
    quicken_blocks(model)
    assert not any(MARK in vars(module) for module in model.modules())


def _call_of(model: Any) -> Any:
    warm(model)
    (call,) = vars(model.model.layers[0])[MARK]._calls.values()
    return call._call


def _with(structure: Any, name: str, value: Any) -> Any:
    changed = type(structure).from_buffer_copy(structure)
    setattr(changed, name, value)
    return changed


Strides = ctypes.c_int64 * 3
WRONG: dict[str, list[Any]] = {
    "x": [None], "y": [None], "room": [None], "matrices": [None], "calls": [None], "cosines": [None], "sines": [None],
    "keys": [None], "values": [None], "length": [0, 31, 33, -32], "room_length": [0, -1], "angles_length": [0, 7],
    "angles_stride": [-1], "keys_length": [0, 15, -1], "values_length": [0, 15, -1], "examples": [0, 2, -1, 1 << 40],
    "heads": [0, 3, 5, 1 << 40], "key_heads": [0, 1, 4, 3], "before": [-1, 1, 1 << 40], "size": [0, 4, 7, 16, 1 << 40],
    "hidden_length": [1, -1], "turned": [0, 4, 7, 16, -8], "angles_type": [-1, 2, 4, 9],
    "activation": [-1, 2], "type": [-1, 0, 3], "threads": [0, -1, 1 << 20], "isa": [-1, 9],
    "cap": [-1.0, float("nan"), float("inf")], "rounded": [-1, 2],
    "norms": [(ctypes.c_void_p * 6)()],
    "norm_lengths": [(ctypes.c_int64 * 6)(32, *rest) for rest in ((31,), (32, 8), (32, 0, 0, 32), (32, 0, 0, 0, 32))],
    "key_strides": [Strides(0, 0, 4), Strides(64, 1 << 40, 8), Strides(64, -8, 8)],
    "value_strides": [Strides(0, 0, 0), Strides(64, 1 << 62, 8)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_the_library_refuses_sizes_that_do_not_fit(
    llama: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _call_of(copy.deepcopy(llama))
    call = cpu.call
    monkeypatch.setattr(
        cpu, "call", lambda function, structure, what: call(function, _with(structure, name, value), what)
    )
    x, caches = torch.randn(1, 1, 32).bfloat16(), [torch.zeros(1, 2, 1, 8).bfloat16() for _ in range(2)]
    angles = (torch.ones(1, 1, 8).bfloat16(),) * 2
    with pytest.raises(BackendError):
        made.run(x, angles, caches, 0)
    assert not any(cache.any() for cache in caches)
    monkeypatch.undo()
    for hidden in ((1,), (-1,), (0, 0)):
        with pytest.raises(BackendError):
            made.run(x, angles, caches, 0, hidden)
    assert made.run(x, angles, caches, 0, (0,)).isfinite().all()
    assert all(cache.any() for cache in caches)


@pytest.mark.parametrize("missing", [(1, 2), (1,), (2,), (5,), (0,), (3,), (4,), (6,), (0, 1, 2)])
def test_the_library_refuses_matrices_that_do_not_belong_together(llama: Any, missing: tuple[int, ...]) -> None:
    """Those of Llama give nothing but their own."""
    model = copy.deepcopy(llama)
    warm(model)
    layer, x = model.model.layers[0], torch.zeros(1, 1, 32).bfloat16()
    attention, mlp = layer.self_attn, layer.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    parts += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    repeats = [one.repeated(torch.Size((1, 1, one.in_features)))[0] for one in parts]
    heads, norms = block.Heads(4, 2, 8, 1.0), [None] * 6
    Block(x, repeats, norms, heads, "silu")
    with pytest.raises(BackendError):
        Block(x, [None if i in missing else one for i, one in enumerate(repeats)], norms, heads, "silu")


def test_dropout_of_a_block_counts(calls: list[int]) -> None:
    model = packed("phi3", resid_pdrop=0.5)
    warm(model)
    calls.clear()
    generate(model)
    assert len(calls) == 7 * LAYERS
    model.model.layers[1].resid_mlp_dropout.train()
    generate(model)  # tries
    calls.clear()
    generate(model)
    assert len(calls) == 7 * (LAYERS - 1)


def test_not_a_number_stays_with_its_example(calls: list[int]) -> None:
    model = packed()
    warm(model, 2)
    calls.clear()
    with torch.no_grad():
        cache = model(text(2)).past_key_values
        cache.layers[1].values[1, 0, 0, 0] = torch.nan
        found = model(text(2, 1), past_key_values=cache).logits
    assert calls
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_layers_of_a_block_keep_their_calls_only_while_they_are_what_they_were(model: Any) -> None:
    layer = next(one for one in model.modules() if isinstance(one, FactoredLinear))
    with torch.no_grad():
        layer(torch.randn(1, 1, 32).bfloat16())
    shape = torch.Size((1, 1, 32))
    found = layer.repeated(shape)
    assert found is not None
    assert all(home.get(name) is home.get(name) for home, name in found[1])
    assert layer.repeated(torch.Size((5, 7, 32))) is None
    layer.runtime.policy = "decode" if layer.runtime.policy == "auto" else "auto"
    assert layer.repeated(shape) is None
