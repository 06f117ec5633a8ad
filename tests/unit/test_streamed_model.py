"""A model whose weights come and go, against the same one that transformers loads whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from verl_fp16.cpu.autocast import softmax_in_float32
from verl_fp16.preflight import stored_weights
from verl_fp16.preflight.activations import Gradients, Tally, Watch, positions
from verl_fp16.preflight.passes import MICRO_BATCH_TOKENS, MicroBatch, measure, micro_batches
from verl_fp16.preflight.refusals import ModelError
from verl_fp16.preflight.shards import open_model
from verl_fp16.preflight.stored_weights import StoredWeights
from verl_fp16.preflight.streamed_model import StreamedModel, build

CPU = torch.device("cpu")
ROUNDING = 2.0**-9  # a few units in the last place of float16: another order of sums


def streamed(folder: Path) -> tuple[StreamedModel, Watch]:
    module = build(folder)
    watch = Watch(module)
    return StreamedModel(module, StoredWeights(module, open_model(folder).weights), CPU, watch.weight_gradient), watch


def sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 250, (length,), generator=generator).tolist() for length in lengths]


class Whole:
    """The model as transformers loads it, in float16 under autocast: largest outputs and gradients by module."""

    def __init__(self, folder: Path, batches: list[MicroBatch], scale: float) -> None:
        self.outputs: dict[str, float] = {}
        self.gradients: dict[str, float] = {}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.half()
        for name, module in self.model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: self._note(name, output))
        tokens = sum(length - 1 for batch in batches for length in batch.lengths)
        with softmax_in_float32(), torch.autocast("cpu", dtype=torch.float16):
            loss = sum(
                -(advantage * self._log_probs(sequence)).sum() / tokens
                for batch in batches
                for sequence, advantage in zip(batch.sequences, batch.advantages, strict=True)
            )
            (loss * scale).backward()

    def _log_probs(self, sequence: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([sequence])
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])

    def _note(self, name: str, output) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.outputs[name] = max(self.outputs.get(name, 0.0), float(tensor.detach().abs().max()))
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._note_gradient(name, gradient))

    def _note_gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.gradients[name] = max(self.gradients.get(name, 0.0), float(gradient.abs().max()))


@pytest.fixture(scope="session")
def tied_model(tiny_model, tmp_path_factory) -> Path:
    """The first one with one tensor for the embedding and the head."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ("tiny_model", "tiny_moe_model", "tied_model"))
def test_activations_and_gradients_are_those_of_the_whole_model(kind, request):
    folder = request.getfixturevalue(kind)
    model, watch = streamed(folder)
    batches = micro_batches(sequences(20, 20, 13), seed=0)
    assert len(batches) == 1 and batches[0].lengths == [13, 20, 20]  # with padding
    measured = measure(model, watch, batches, start=10)
    whole = Whole(folder, batches, 2.0**10)
    compared = [name for name in whole.outputs if name]
    assert len(compared) > 30
    for name in compared:
        assert measured.outputs[name].largest == pytest.approx(whole.outputs[name], rel=ROUNDING), name
    for name, largest in whole.gradients.items():
        if name:
            assert measured.gradients[10].outputs[name].largest == pytest.approx(largest, rel=4 * ROUNDING), name
    for name, parameter in whole.model.named_parameters():
        if kind == "tied_model" and "embed" in name:
            continue  # each of its uses is looked at by itself
        largest = float(parameter.grad.abs().max())
        assert measured.gradients[10].weights[name].largest == pytest.approx(largest, rel=4 * ROUNDING), name


@pytest.mark.parametrize("kind", ("tiny_model", "tiny_moe_model"))
def test_weights_go_as_soon_as_a_backward_pass_has_used_them(kind, request, monkeypatch):
    model, watch = streamed(request.getfixturevalue(kind))
    let_go, left = model.let_go, []

    def noted() -> None:
        left.append([model._names[id(p)] for p in model._streamed if p.untyped_storage().size()])
        let_go()

    monkeypatch.setattr(model, "let_go", noted)
    measure(model, watch, micro_batches(sequences(20), seed=0), start=10)
    assert len(left) > 1 and not any(left)


def test_what_is_computed_again_is_not_counted_again(tiny_model):
    model, watch = streamed(tiny_model)
    measured = measure(model, watch, micro_batches(sequences(20, 13), seed=0), start=10)
    hidden = model.module.config.hidden_size
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1", "model.norm"):
        assert measured.outputs[name].values == (20 + 13) * hidden, name


def test_the_tied_weight_has_a_gradient_from_each_of_its_uses(tied_model):
    model, watch = streamed(tied_model)
    measured = measure(model, watch, micro_batches(sequences(20), seed=0), start=10)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= measured.gradients[10].weights.keys()


@pytest.mark.parametrize("kind", ("tiny_model", "tiny_moe_model", "tied_model"))
@pytest.mark.parametrize("piece", (100, 2**20))
def test_each_parameter_is_what_transformers_loads(kind, piece, request, monkeypatch):
    """With stacked experts, bit by bit, in whole and in rows."""
    monkeypatch.setattr(stored_weights, "PIECE", piece)
    folder = request.getfixturevalue(kind)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = StoredWeights(build(folder), open_model(folder).weights)
    assert stored.unused == []
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        out = torch.empty(parameter.shape, dtype=torch.float16)
        stored.read_into(name, out)
        assert torch.equal(out, parameter.half()), name
        if out.dim() == 2:
            parts = list(stored.rows(name, out.shape, torch.float16, most=piece))
            assert torch.equal(torch.cat([values for _, values in parts]), out)
            assert [rows.start for rows, _ in parts[1:]] == [rows.stop for rows, _ in parts[:-1]]


def test_experts_that_transformers_has_to_convert_come_out_the_same(tiny_moe_model, monkeypatch):
    stored = StoredWeights(build(tiny_moe_model), open_model(tiny_moe_model).weights)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    one, other = torch.empty(2, 4, 128, 64, dtype=torch.float16)
    stored.read_into(name, one)
    monkeypatch.setattr(stored_weights, "_places", lambda recipe, shape: None)
    stored.read_into(name, other)
    assert torch.equal(one, other)


def test_no_weight_stays_in_memory(tiny_moe_model):
    model, watch = streamed(tiny_moe_model)
    measure(model, watch, micro_batches(sequences(20), seed=0), start=10)
    held = {name: parameter for name, parameter in model.module.named_parameters() if parameter.device == CPU}
    assert any("experts" in name for name in held) and any("norm" in name for name in held)
    assert {name for name, parameter in held.items() if parameter.untyped_storage().size()} == set()
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_what_the_checkpoint_lacks_is_named(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file)
    with pytest.raises(ModelError, match="needs model.layers.0.mlp.up_proj.weight.* for model.layers.0.other.weight"):
        StoredWeights(build(tmp_path / "model"), open_model(tmp_path / "model").weights)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"up_proj.weight is of shape \(3, 3\), and config.json makes"):
        StoredWeights(build(tmp_path / "model"), open_model(tmp_path / "model").weights)


class Sums(nn.Module):
    """Two layers whose sum overflows, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + self.second(x))


def test_the_culprit_is_who_made_it_of_finite_inputs():
    model = nn.Sequential(nn.Identity(), Sums(), nn.Identity())
    watch = Watch(model)
    watch.start([])
    model(torch.full((2, 3), 4e4, dtype=torch.float16))
    # Nothing is wrong with 1.last: what it was given is not finite, and its parent made that.
    assert watch.culprits == ["1"]
    assert [name for name, tally in watch.outputs.items() if tally.non_finite] == ["1.last", "1", "2", "(the model)"]


def test_a_tally_counts_what_is_there(monkeypatch):
    monkeypatch.setattr("verl_fp16.preflight.activations._PIECE", 3)
    tally = Tally()
    tally.add(torch.tensor([[0.0, -3.0, 2.0], [torch.inf, -torch.inf, torch.nan], [0.0, 0.0, 1.0]]).half())
    assert (tally.values, tally.non_finite, tally.zeros, tally.largest) == (9, 3, 3, 3.0)
    assert tally.headroom == pytest.approx(65504 / 3)
    assert Tally().headroom is None


def test_padding_and_last_positions_are_not_looked_at():
    lengths = [2, 3]
    values = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    for shaped in (values, values.reshape(6, 4)):
        assert torch.cat(list(positions(shaped, lengths))).tolist() == [*values[0, :2].tolist(), *values[1].tolist()]
        kept = torch.cat(list(positions(shaped, lengths, last=False))).tolist()
        assert kept == [*values[0, :1].tolist(), *values[1, :2].tolist()]
    other = torch.ones(5, 7)
    assert [part.shape for part in positions(other, lengths)] == [(5, 7)]


def test_gradients_are_merged_by_name():
    one, other = Gradients(4.0), Gradients(4.0)
    one.note(one.outputs, "a", iter([torch.tensor([1.0, 0.0])]))
    other.note(other.outputs, "a", iter([torch.tensor([3.0, torch.inf])]))
    other.note(other.weights, "b", iter([torch.tensor([torch.nan])]))
    one.merge(other)
    assert (one.largest, one.non_finite, one.first_non_finite) == (3.0, 2, "a")
    assert (one.outputs["a"].values, one.outputs["a"].zeros) == (4, 1)


def test_micro_batches_hold_like_lengths_and_bounded_padding():
    batches = micro_batches(sequences(*range(10, 300, 17)), seed=1)
    lengths = [length for batch in batches for length in batch.lengths]
    assert lengths == sorted(range(10, 300, 17))
    for batch in batches:
        assert len(batch.lengths) * max(batch.lengths) <= MICRO_BATCH_TOKENS or len(batch.lengths) == 1
        assert set(batch.advantages) <= {-1.0, 1.0}
    assert {a for batch in batches for a in batch.advantages} == {-1.0, 1.0}
    assert micro_batches(sequences(10, 20), seed=1) == micro_batches(sequences(10, 20), seed=1)
