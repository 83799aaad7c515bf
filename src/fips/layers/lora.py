"""LoRA on packed layers; ``fips.registration`` hands them to peft.

An adapter leaves the packed layer as it is and adds ``scaling * B A x``. It is trained, saved and loaded by peft as any
other. Merging an adapter gives a plain dense layer, since basis times factor cannot hold a dense update exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers import PreTrainedModel

from fips.errors import ModelError
from fips.layers.embedding import PackedEmbedding, TiedLayer
from fips.layers.linear import FactoredLinear
from fips.layers.merge import dense_layer

__all__ = ["LoraFactoredLinear", "adaptable", "packed_adapter"]

READS_WEIGHTS = ("pissa", "olora", "corda", "loftq")
"""Starts of an adapter that are made from the weights of its layer."""


class LoraFactoredLinear(LoraLinear):  # type: ignore[misc]
    r"""A packed layer plus low-rank adapters: :math:`y = W x + b + \sum_a s_a B_a A_a x` with packed :math:`W`."""

    base_layer: nn.Module
    _packed: tuple[FactoredLinear | TiedLayer]
    """The packed layer while a merged one stands in its place; a tuple keeps it out of the module tree."""

    def _get_in_out_features(self, module: FactoredLinear | TiedLayer) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put a dense layer with the adapters added in the place of the packed one; ``unmerge`` brings it back."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if not self.merged:
            assert isinstance(self.base_layer, FactoredLinear | TiedLayer)
            self._packed = (self.base_layer,)
        merged = self._dense([*self.merged_adapters, *names])
        if safe_merge and not all(bool(tensor.isfinite().all()) for tensor in merged.parameters()):
            raise ValueError(f"the merged weights are not finite; adapters {list(names)} seem to be broken")
        self.base_layer = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        if self.merged:
            (self.base_layer,) = self._packed
            self.merged_adapters.clear()

    def _dense(self, names: Sequence[str]) -> nn.Module:
        (packed,) = self._packed
        weight, bias = packed.dense_weight(), packed.bias
        for name in names:
            if self.lora_variant.get(name) is not None:
                raise NotImplementedError(f"adapter `{name}` is a variant of LoRA that packed layers cannot merge")
            weight = weight + self.get_delta_weight(name).float()
            if self.lora_bias[name]:
                added = self.lora_B[name].bias.detach() * self.scaling[name]
                bias = nn.Parameter(added if bias is None else bias.detach() + added.to(bias.dtype))
        return dense_layer(packed, packed.weight.dtype, weight=weight, bias=bias)


def adaptable(model: nn.Module) -> list[str]:
    """Names of the packed linear layers of a model: no embeddings, and no head, as peft leaves out those of others."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear) and not isinstance(module, PackedEmbedding) and module is not head
    ]


def packed_adapter(
    config: LoraConfig, adapter_name: str, target: nn.Module, **options: Any
) -> LoraFactoredLinear | None:
    """What peft puts in the place of a packed layer, or of one that has adapters; None for every other layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, PackedEmbedding) or (isinstance(base, TiedLayer) and base.lookup is not None):
        raise ModelError(
            f"an adapter is asked for on a packed embedding of {base.num_embeddings} rows; LoRA adapts the linear "
            "layers: leave it out of `target_modules`, or call `fips.merge(model)` first"
        )
    if not isinstance(base, FactoredLinear | TiedLayer) or config._custom_modules:
        return None
    start = str(config.init_lora_weights).lower()
    if config.use_dora or start.startswith(READS_WEIGHTS):
        setting = "use_dora=True" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
        raise ModelError(
            f"an adapter with `{setting}` reads the weights of its layer, which is packed; leave that out, or call "
            "`fips.merge(model)` first"
        )
    options.pop("device_map", None)
    return LoraFactoredLinear(target, adapter_name, config=config, **options)
