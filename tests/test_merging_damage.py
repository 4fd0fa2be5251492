"""Damaged merges: each damage is reported correctly, with the layer, and nothing else is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, TARGETS
from merges import damaged, merge_by_peft, save_adapter_of, save_model

from lora_probe.errors import UnreadableFile
from lora_probe.merging.report import MergeReport
from lora_probe.merging.weights import check_merge

Q = "model.layers.{}.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj.weight"
ALL = [f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in TARGETS]


class World:
    """A base of one dtype, an adapter on it, its merge by PEFT, and the pieces to damage it with."""

    def __init__(self, root: Path, dtype: str, kind: str = "wide") -> None:
        self.root, self.dtype = root, dtype
        self.base = save_model(root / "base", kind, dtype)
        self.adapter = save_adapter_of(root / "adapter", self.base, target_modules=list(TARGETS))
        self.merged = merge_by_peft(root / "merged", self.adapter, self.base, dtype)
        self.count = 0

    def tensors(self, folder: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.root / folder / "model.safetensors")

    def delta(self, label: str) -> Any:
        """s·B·A of a module, in float32."""
        from safetensors.torch import load_file

        pairs = load_file(self.adapter / "adapter_model.safetensors")
        stem = f"base_model.model.{label}"
        return 2 * pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]

    def with_changes(self, make: Callable[[str, Any], Any]) -> dict[str, Any]:
        """All adapted weights made from the base's by `make(label, W)`, rounded to the dtype."""
        base = self.tensors("base")
        return {f"{label}.weight": make(label, base[f"{label}.weight"].float()).to(base[DOWN].dtype) for label in ALL}

    def check(self, edit: Callable[[dict[str, Any]], dict[str, Any]], **config: Any) -> MergeReport:
        self.count += 1
        folder = damaged(self.merged, self.root / f"damaged-{self.count}", edit, **config)
        return check_merge(self.adapter, folder, model=str(self.base))


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


def found(report: MergeReport) -> dict[str, tuple[str, ...]]:
    """The findings: code -> modules or tensors."""
    assert report.verdict == "differs"
    return {diagnostic.code: diagnostic.modules for diagnostic in report.diagnostics}


def test_pristine(world: World) -> None:
    report = world.check(lambda tensors: tensors | world.tensors("base"))
    assert found(report) == {"LP701": tuple(ALL)}
    assert report.diagnostics[0].message.startswith(
        f"{len(ALL)} of {len(ALL)} modules: the base model's weight, unchanged"
    )
    assert all(module.implied_scaling == 0 for module in report.modules)


def test_twice_by_merging_into_the_merged(world: World) -> None:
    twice = merge_by_peft(world.root / "twice", world.adapter, world.merged, world.dtype)
    report = check_merge(world.adapter, twice, model=str(world.base))
    assert found(report) == {"LP702": tuple(ALL)}
    assert report.diagnostics[0].message == f"{len(ALL)} of {len(ALL)} modules: merged twice"
    assert all(module.implied_scaling == pytest.approx(4) for module in report.modules)


@pytest.mark.parametrize("factor", [1.001, 0.999, 0.5, 8.0, 3.7])
def test_another_scaling(factor: float, world: World) -> None:
    report = world.check(lambda t: t | world.with_changes(lambda label, w: w + factor * world.delta(label)))
    assert set(found(report)) == {"LP703"}
    for module in report.modules:
        assert module.status == "differs"
        assert module.implied_scaling == pytest.approx(2 * factor, rel=1e-4)
    if factor == 8:
        assert "alpha instead of alpha / r" in report.diagnostics[0].message


def test_subtracted(world: World) -> None:
    report = world.check(lambda t: t | world.with_changes(lambda label, w: w - world.delta(label)))
    assert found(report) == {"LP704": tuple(ALL)}


def test_one_layer_left_out(world: World) -> None:
    names = [f"model.layers.1.self_attn.{name}" for name in TARGETS]
    base = world.tensors("base")
    report = world.check(lambda t: t | {f"{name}.weight": base[f"{name}.weight"] for name in names})
    assert found(report) == {"LP701": tuple(names)}
    assert "layer 1 q_proj, k_proj, v_proj" in report.diagnostics[0].message


@pytest.mark.parametrize(
    ("one", "other"), [(Q.format(0), Q.format(2)), (Q.format(1), ALL[4])], ids=["layers", "q and k"]
)
def test_two_changes_swapped(one: str, other: str, world: World) -> None:
    swapped = {one: other, other: one}
    changes = world.with_changes(lambda label, w: w + world.delta(swapped.get(label, label)))
    report = world.check(lambda t: t | {f"{label}.weight": changes[f"{label}.weight"] for label in swapped})
    assert found(report) == {"LP705": tuple(sorted(swapped, key=ALL.index))}
    messages = {module.label: module.findings[0].message for module in report.modules if module.findings}
    assert messages == {label: f"it contains the change of {swap}" for label, swap in swapped.items()}


def test_two_whole_weights_swapped(world: World) -> None:
    one, other = f"{Q.format(0)}.weight", f"{Q.format(2)}.weight"
    report = world.check(lambda t: t | {one: t[other], other: t[one]})
    assert found(report) == {"LP705": (Q.format(0), Q.format(2))}
    assert "it contains the weight of" in report.diagnostics[0].message


def test_a_transposed_change(world: World) -> None:
    report = world.check(lambda t: t | world.with_changes(lambda label, w: w + world.delta(label).T))
    assert found(report) == {"LP720": tuple(ALL)}


def test_another_adapter(world: World) -> None:
    other = save_adapter_of(world.root / "other", world.base, seed=7, target_modules=list(TARGETS))
    merged = merge_by_peft(world.root / "other-merged", other, world.base, world.dtype)
    report = check_merge(world.adapter, merged, model=str(world.base))
    assert found(report) == {"LP706": tuple(ALL)}
    assert all(abs(module.share or 1) < 0.1 for module in report.modules)


def test_noise_in_one_tensor(world: World) -> None:
    import torch

    name = f"{Q.format(1)}.weight"

    def noisy(tensors: dict[str, Any]) -> dict[str, Any]:
        noise = 0.02 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3))
        return tensors | {name: (tensors[name].float() + noise).to(tensors[name].dtype)}

    assert found(world.check(noisy)) == {"LP706": (Q.format(1),)}


def test_one_value(world: World) -> None:
    """A single value of a tensor is wrong."""

    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        changed = tensors[f"{Q.format(2)}.weight"].clone()
        changed[77, 33] += 0.5
        return tensors | {f"{Q.format(2)}.weight": changed}

    report = world.check(edit)
    assert found(report) == {"LP706": (Q.format(2),)}
    assert "1 of 16384 values" in report.diagnostics[0].message


def test_a_tensor_that_no_adapter_touches(world: World) -> None:
    report = world.check(lambda t: t | {DOWN: t[DOWN] * 1.01})
    assert found(report) == {"LP708": (DOWN,)}
    assert all(module.status == "verified" for module in report.modules)


def test_a_missing_and_an_added_tensor(world: World) -> None:
    report = world.check(lambda t: {"lora_A.extra": t[DOWN]} | {name: t[name] for name in t if name != DOWN})
    assert found(report) == {"LP709": (DOWN,), "LP710": ("lora_A.extra",)}


def test_another_base(world: World) -> None:
    import torch

    generator = torch.Generator().manual_seed(5)

    def other(tensors: dict[str, Any]) -> dict[str, Any]:
        return {n: t + 0.02 * torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in tensors.items()}

    report = world.check(other)
    assert report.diagnostics[0].code == "LP714"
    assert set(found(report)) == {"LP714"}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_not_finite(value: str, world: World) -> None:
    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        changed = tensors[f"{Q.format(0)}.weight"].clone()
        changed[3, 4] = float(value)
        return tensors | {f"{Q.format(0)}.weight": changed}

    assert found(world.check(edit)) == {"LP711": (Q.format(0),)}


def test_an_adapter_that_is_not_finite(world: World) -> None:
    from safetensors.torch import load_file, save_file

    broken = world.root / "broken"
    broken.mkdir()
    tensors = load_file(world.adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q.format(0)}.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_bytes((world.adapter / "adapter_config.json").read_bytes())
    merged = merge_by_peft(world.root / "broken-merged", broken, world.base, world.dtype)
    report = check_merge(broken, merged, model=str(world.base))
    assert found(report) == {"LP711": (Q.format(0),)}
    assert "the adapter's pair is not finite either" in report.diagnostics[0].message


def test_one_tied_place_only(tmp_path: Path) -> None:
    """Both embeddings are in the files, one of them unchanged, and the config ties them."""
    from safetensors.torch import load_file

    base = save_model(tmp_path / "base", "tied")
    adapter = save_adapter_of(
        tmp_path / "adapter", base, target_modules=["q_proj"], trainable_token_indices=[3, 5, 287]
    )
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    pristine = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    inconsistent = damaged(merged, tmp_path / "inconsistent", lambda t: t | {"lm_head.weight": pristine})
    report = check_merge(adapter, inconsistent, model=str(base))
    codes = found(report)
    assert codes["LP712"] == ("lm_head.weight",)
    assert codes["LP719"] == ("lm_head",)


def test_a_head_untied_by_the_merge(tmp_path: Path) -> None:
    """An adapter on the embeddings only, merged into an untied copy: the head correctly keeps the base's matrix."""
    base = save_model(tmp_path / "base", "tied")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    from safetensors.torch import load_file

    pristine = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    untied = damaged(merged, tmp_path / "untied", lambda t: t | {"lm_head.weight": pristine}, tie_word_embeddings=False)
    report = check_merge(adapter, untied, model=str(base))
    assert report.verdict == "verified"
    assert not report.diagnostics


def test_both_tied_places_adapted_add_up(tmp_path: Path) -> None:
    """PEFT 0.21 with ensure_weight_tying merges the shared change into the one matrix twice."""
    base = save_model(tmp_path / "base", "tied")
    config = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    adapter = save_adapter_of(tmp_path / "adapter", base, **config)
    report = check_merge(adapter, merge_by_peft(tmp_path / "merged", adapter, base, "float32"), model=str(base))
    assert found(report) == {"LP702": ("model.embed_tokens", "lm_head")}


def test_saved_modules_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    pristine = load_file(base / "model.safetensors")["lm_head.weight"]
    report = check_merge(
        adapter, damaged(merged, tmp_path / "bad", lambda t: t | {"lm_head.weight": pristine}), model=str(base)
    )
    assert found(report) == {"LP719": ("lm_head",)}
    assert "the base model's are there instead" in report.diagnostics[0].message


@pytest.mark.parametrize(("value", "code"), [(None, "LP701"), (float("nan"), "LP711")])
def test_a_part_of_one_expert(value: float | None, code: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = save_model(tmp_path / "base", "moe")
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    adapter = save_adapter_of(tmp_path / "adapter", base, **config)
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    pristine = load_file(base / "model.safetensors")[name]
    wrong = pristine if value is None else pristine * value
    report = check_merge(adapter, damaged(merged, tmp_path / "bad", lambda t: t | {name: wrong}), model=str(base))
    assert found(report) == {code: ("model.layers.1.mlp.experts.gate_proj[2]",)}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_part_that_an_initialisation_takes_out(init: str, tmp_path: Path) -> None:
    """Added to the whole base, as by a tool that supports only plain LoRA."""
    from safetensors.torch import load_file

    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"], init_lora_weights=init)
    pairs = load_file(adapter / "adapter_model.safetensors")

    def naive(tensors: dict[str, Any]) -> dict[str, Any]:
        for name in [name for name in tensors if "q_proj" in name]:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[name] = tensors[name] + 2 * pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]
        return tensors

    report = check_merge(adapter, damaged(base, tmp_path / "naive", naive), model=str(base))
    assert found(report) == {"LP721": tuple(Q.format(layer) for layer in range(LAYERS))}


def test_dora_merged_as_plain_lora(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", "bfloat16")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"], use_dora=True)
    config = adapter / "adapter_config.json"
    written = config.read_text()
    tensors = (adapter / "adapter_model.safetensors").read_bytes()
    from safetensors.torch import load_file, save_file

    plain = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if "magnitude" not in n}
    save_file(plain, adapter / "adapter_model.safetensors")
    config.write_text(json.dumps(json.loads(written) | {"use_dora": False}))
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "bfloat16")
    (adapter / "adapter_model.safetensors").write_bytes(tensors)
    config.write_text(written)
    report = check_merge(adapter, merged, model=str(base))
    assert found(report) == {"LP722": tuple(Q.format(layer) for layer in range(LAYERS))}


def test_biases_that_were_dropped(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = save_model(tmp_path / "base", "qwen2")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"], bias="lora_only")
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    pristine = {n: t for n, t in load_file(base / "model.safetensors").items() if n.endswith("q_proj.bias")}
    report = check_merge(adapter, damaged(merged, tmp_path / "bad", lambda t: t | pristine), model=str(base))
    assert found(report) == {"LP719": tuple(f"{Q.format(layer)}.bias" for layer in range(LAYERS))}


def test_what_has_no_place_puts_nothing_else_in_the_wrong(tmp_path: Path) -> None:
    """A module that cannot be matched to the files: the tensor that it changed is not reported as another base's."""
    from conftest import edited

    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"])
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    renamed = edited(adapter, tmp_path / "renamed", lambda t: {_oddly(name): tensor for name, tensor in t.items()})
    report = check_merge(renamed, merged, model=str(base))
    assert report.verdict == "undecided"
    assert {diagnostic.code for diagnostic in report.diagnostics} == {"LP715"}


def _oddly(name: str) -> str:
    return name.replace("layers.1.self_attn.q_proj", "odd.7.thing")


def test_many_damaged_modules_take_time_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other site is read once, however many modules are wrong."""
    from lora_probe.merging import neighbours

    world = World(tmp_path, "float32")
    calls: list[str] = []
    original = neighbours.change_of

    def counted(site: Any, adapter: Any) -> Any:
        calls.append(site.label)
        return original(site, adapter)

    monkeypatch.setattr(neighbours, "change_of", counted)
    other = save_adapter_of(tmp_path / "other", world.base, seed=7, target_modules=list(TARGETS))
    merged = merge_by_peft(tmp_path / "other-merged", other, world.base, "float32")
    assert check_merge(world.adapter, merged, model=str(world.base)).verdict == "differs"
    assert sorted(calls) == sorted(ALL)


def test_what_is_not_supported_is_never_passed(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"])
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "corda"}))
    report = check_merge(adapter, merged, model=str(base))
    assert report.verdict == "undecided"
    assert [diagnostic.code for diagnostic in report.diagnostics] == ["LP715"]


class Shards:
    def __init__(self, root: Path) -> None:
        self.base = save_model(root / "base", "llama")
        self.adapter = save_adapter_of(root / "adapter", self.base, target_modules=list(TARGETS))
        self.merged = merge_by_peft(root / "merged", self.adapter, self.base, "float32", max_shard_size="400KB")

    def of_layer(self, layer: int) -> Path:
        index = json.loads((self.merged / "model.safetensors.index.json").read_text())["weight_map"]
        return self.merged / index[f"model.layers.{layer}.self_attn.v_proj.weight"]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path)


def test_a_missing_shard(shards: Shards) -> None:
    gone = shards.of_layer(2)
    gone.unlink()
    with pytest.raises(UnreadableFile, match=rf"{gone.name} is missing, which holds layers? .*2"):
        check_merge(shards.adapter, shards.merged, model=str(shards.base))


def test_a_truncated_shard(shards: Shards) -> None:
    short = shards.of_layer(1)
    short.write_bytes(short.read_bytes()[:-1000])
    with pytest.raises(UnreadableFile, match=rf"{short.name}` is truncated.*which holds layers? .*1"):
        check_merge(shards.adapter, shards.merged, model=str(shards.base))


def test_a_missing_shard_without_an_index(shards: Shards) -> None:
    (shards.merged / "model.safetensors.index.json").unlink()
    gone = sorted(shards.merged.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(UnreadableFile, match=rf"is incomplete: {gone.name} is missing"):
        check_merge(shards.adapter, shards.merged, model=str(shards.base))


def test_folders_that_are_no_merged_model(shards: Shards, tmp_path: Path) -> None:
    other = save_model(tmp_path / "gpt2", "gpt2")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    for folder, words in (
        (other, "has another architecture"),
        (empty, "holds no weights"),
        (shards.adapter, "is an adapter, not a merged model"),
        (tmp_path / "nowhere", "merged model .* was not found"),
    ):
        with pytest.raises(UnreadableFile, match=words):
            check_merge(shards.adapter, folder, model=str(shards.base))
    (empty / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnreadableFile, match="Git LFS pointer"):
        check_merge(shards.adapter, empty, model=str(shards.base))
