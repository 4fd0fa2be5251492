"""Variants of LoRA and initialisations: everything that is known about each, in one table of each kind.

In: the fields of `adapter_config.json`. Out: the rows that apply. A new variant of PEFT needs one entry here, and code
only where it has arithmetic of its own. Rows hold facts; what follows from them for an engine is judged by the rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from lora_probe.adapter.blocks import FIELD as BDLORA

ALWAYS = "0.0"
"""In place of a version of vLLM: every version that lora-probe knows does it."""

REPLAYED = ""
"""`parity` replays PEFT's merge of the variant."""


@dataclass(frozen=True)
class ExtraTensor:
    """A third tensor beside A and B, which the variant saves for every module: `<module>.<name>`, perhaps with
    `.weight` behind it. `word` is for one of a module, `plural` for those of a whole file. `in_parts`: it is several
    tensors, `<module>.<name>.<part>`. `in_training`: only training needs it, the contribution is that of plain LoRA."""

    name: str
    word: str
    plural: str
    in_parts: bool = False
    in_training: bool = False

    def is_named(self, tensor: str) -> bool:
        """Whether `tensor`, the name of one in a file, is one of these."""
        return f".{self.name}." in f".{tensor}."


@dataclass(frozen=True)
class Variant:
    """A field of the config that makes an adapter more than plain LoRA when it holds a value.

    `title` is the variant's name in PEFT's documentation, `long_title` one that explains itself. `extra` is its third
    tensor. `vllm_applies` and `vllm_refuses` are the first versions of vLLM that do so: an older one ignores the field
    and runs the adapter as plain LoRA. `selects_modules`: the field is only about which modules are adapted,
    and vLLM sees that in the tensors. `not_replayed` is why `parity` cannot replay PEFT's merge of it (REPLAYED if it
    can): PEFT may merge it all the same. It must be passed, because a merge that cannot be replayed looks like none.
    """

    field: str
    title: str
    long_title: str = ""
    _: KW_ONLY
    not_replayed: str
    extra: ExtraTensor | None = None
    selects_modules: bool = False
    vllm_applies: str = ""
    vllm_refuses: str = ""

    @property
    def described(self) -> str:
        return self.long_title or self.title

    @property
    def vllm_ignores(self) -> bool:
        """Whether every vLLM runs the adapter as plain LoRA: it never reads the field."""
        return not (self.selects_modules or self.vllm_applies or self.vllm_refuses)


DORA = Variant(
    "use_dora",
    "DoRA",
    extra=ExtraTensor("lora_magnitude_vector", "magnitude vector", "magnitude vectors of DoRA"),
    vllm_refuses=ALWAYS,
    not_replayed=REPLAYED,
)
LORA_BIAS = Variant(
    "lora_bias",
    "lora_bias",
    "a bias on lora_B (lora_bias)",
    extra=ExtraTensor("lora_B.bias", "bias of lora_B", "biases of lora_B"),
    vllm_refuses="0.32",
    not_replayed=REPLAYED,
)
RANK_PATTERN = Variant("rank_pattern", "rank_pattern", vllm_applies="0.32", not_replayed=REPLAYED)
ALPHA_PATTERN = Variant("alpha_pattern", "alpha_pattern", vllm_applies="0.32", not_replayed=REPLAYED)


NOT_MERGED = "PEFT does not merge it"
_OTHER_MERGE = "its merge is not s·B·A"

KASA = Variant(
    "kasa_config",
    "KaSA",
    extra=ExtraTensor("lora_diag", "diagonal", "diagonals of KaSA"),
    not_replayed=_OTHER_MERGE,
)
ALORA = Variant(
    "alora_invocation_tokens",
    "aLoRA",
    "Activated LoRA (aLoRA)",
    vllm_refuses="0.32",
    not_replayed=NOT_MERGED,
)

VARIANTS = (
    Variant("use_rslora", "rsLoRA", vllm_applies=ALWAYS, not_replayed=REPLAYED),
    DORA,
    Variant("use_qalora", "QALoRA", vllm_refuses="0.32", not_replayed=_OTHER_MERGE),
    Variant(
        BDLORA,
        "BD-LoRA",
        "block-diagonal LoRA (BD-LoRA)",
        vllm_refuses="0.32",
        not_replayed=REPLAYED,
    ),
    LORA_BIAS,
    RANK_PATTERN,
    ALPHA_PATTERN,
    # vLLM reads a trained classification head and refuses the rest: LP406 judges that by the names in the list.
    Variant("modules_to_save", "modules_to_save", vllm_applies=ALWAYS, not_replayed=REPLAYED),
    Variant("trainable_token_indices", "trainable tokens", selects_modules=True, not_replayed=REPLAYED),
    Variant("target_parameters", "target_parameters", selects_modules=True, not_replayed=REPLAYED),
    Variant("layers_to_transform", "layers_to_transform", selects_modules=True, not_replayed=REPLAYED),
    Variant("exclude_modules", "exclude_modules", selects_modules=True, not_replayed=REPLAYED),
    Variant(
        "layer_replication",
        "layer_replication",
        vllm_refuses="0.32",
        not_replayed="the model has layers that the base's files lack",
    ),
    ALORA,
    Variant("arrow_config", "Arrow", not_replayed=NOT_MERGED),
    KASA,
    Variant(
        "monteclora_config",
        "MonteCLoRA",
        extra=ExtraTensor(
            "lora_monteclora_sampler", "sampler", "samplers of MonteCLoRA", in_parts=True, in_training=True
        ),
        not_replayed=REPLAYED,
    ),
    Variant(
        "velora_config",
        "VeLoRA",
        extra=ExtraTensor("lora_velora_embed", "projection", "projections of VeLoRA", in_training=True),
        not_replayed=REPLAYED,
    ),
)
"""In the order in which an adapter's variants are listed. Those of PEFT 0.21."""

EXTRAS = {variant.field: variant.extra for variant in VARIANTS if variant.extra is not None}
"""The third tensors, by the field of the config that asks for them."""
BY_FIELD = {variant.field: variant for variant in VARIANTS}


def variants_of(raw: Mapping[str, Any]) -> list[Variant]:
    """The variants that a config asks for."""
    return [variant for variant in VARIANTS if raw.get(variant.field)]


Base = Literal["kept", "recomputed", "random", "of data", "in training"]


@dataclass(frozen=True)
class Initialisation:
    """One value of `init_lora_weights`.

    `name` as PEFT spells it, `any_case` where PEFT compares without case. `spelling` is the expression that the whole
    word must match where it is more than the name. `loads`: PEFT accepts it for a saved adapter, when no data from
    training is there. `settings` is the field of the config that holds its settings. `vllm_refuses` is the first vLLM
    that does; one that refuses none runs the adapter as plain LoRA. `plain`: the adapter is plain LoRA.

    `base` is what the initialisation does to the base's weights: `kept`: nothing. `recomputed`: PEFT takes the same
    part out of them on every load, so that a merge can be replayed. `random`: PEFT takes out another part on every
    load. `of data`: PEFT takes out a part that depends on data from training. `in training`: the part was taken out in
    training and is not on loading.
    """

    name: str
    any_case: bool = False
    spelling: str = ""
    loads: bool = True
    base: Base = "kept"
    settings: str = ""
    vllm_refuses: str = ""
    plain: bool = False

    @property
    def changes_base(self) -> bool:
        """Whether PEFT takes a part out of the base when it loads the adapter."""
        return self.base in ("recomputed", "random", "of data")

    @property
    def prefix(self) -> bool:
        """Whether a longer word is read as this one too: PEFT looks only at the beginning of some of these."""
        return self.changes_base

    def accepts(self, value: str) -> bool:
        """Whether PEFT loads an adapter with this very value."""
        flags = re.IGNORECASE if self.any_case else 0
        return self.loads and re.fullmatch(self.spelling or re.escape(self.name), value, flags) is not None


INITIALISATIONS = (
    Initialisation("gaussian", any_case=True, plain=True),
    Initialisation("eva", settings="eva_config"),
    Initialisation("orthogonal"),
    Initialisation("mica", any_case=True),
    Initialisation("pissa", base="recomputed", vllm_refuses="0.32"),
    Initialisation("pissa_niter", spelling=r"pissa_niter_\d+", base="random", vllm_refuses="0.32"),
    Initialisation("olora", any_case=True, base="recomputed", vllm_refuses="0.32"),
    Initialisation("corda", loads=False, base="of data", settings="corda_config", vllm_refuses="0.32"),
    Initialisation("loftq", base="of data", settings="loftq_config", vllm_refuses="0.32"),
    Initialisation("lora_ga", base="in training", settings="lora_ga_config"),
)
"""Those of PEFT 0.21 (`LoraLayer.reset_lora_parameters`)."""

UNKNOWN_INITIALISATION_REFUSED = "0.32"
"""The first vLLM that refuses a word that it does not know."""


def initialisation(value: object) -> Initialisation | None:
    """The row for a value of `init_lora_weights`, in whatever case it is written; None for `true` and unknown words."""
    if not isinstance(value, str):
        return None
    word = value.lower()
    rows = [row for row in INITIALISATIONS if word == row.name or (row.prefix and word.startswith(row.name))]
    return max(rows, key=lambda row: len(row.name), default=None)
