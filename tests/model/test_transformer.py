from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize


@torch.no_grad()
@pytest.mark.parametrize("changed", [1, 6, 11])
def test_the_future_does_not_change_the_past(
    model: CausalLM, ids: torch.Tensor, changed: int
) -> None:
    other = ids.clone()
    other[:, changed:] = (other[:, changed:] + 7) % 61
    before, after = model(ids), model(other)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=0, atol=1e-6)
    assert (before[:, changed] - after[:, changed]).abs().max() > 1e-2


@torch.no_grad()
def test_every_past_token_matters_that_windows_reach(model: CausalLM, ids: torch.Tensor) -> None:
    config, last = model.config, ids.shape[1] - 1
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    # What a block has not seen itself, the one below it may have told.
    reach = sum(last if window is None else window - 1 for window in windows)
    before = model(ids)[:, -1]
    for column in range(ids.shape[1]):
        other = ids.clone()
        other[:, column] = (other[:, column] + 7) % 61
        moved = (model(other)[:, -1] - before).abs().max()
        assert moved > 1e-4 if column >= last - reach else moved == 0, column


@torch.no_grad()
def test_order_matters(model: CausalLM, ids: torch.Tensor) -> None:
    swapped = ids.clone()
    swapped[:, [2, 5]] = swapped[:, [5, 2]]
    assert (model(swapped)[:, -1] - model(ids)[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_only_distances_matter_and_not_where_a_row_begins(
    model: CausalLM, ids: torch.Tensor
) -> None:
    shifted = torch.arange(12)[None].expand(3, -1) + 40
    if model.config.family == "gpt2":
        assert (model(ids, positions=shifted) - model(ids)).abs().max() > 1e-2, "it learns places"
        return
    torch.testing.assert_close(model(ids, positions=shifted), model(ids), rtol=0, atol=2e-5)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model: CausalLM, ids: torch.Tensor) -> None:
    lengths = [5, 1, 6]
    packed = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(packed, positions, segments)[0].split(lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(together[i], model(ids[i : i + 1, :n])[0], rtol=0, atol=3e-5)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(model: CausalLM, ids: torch.Tensor) -> None:
    padded = torch.cat([ids, torch.zeros(3, 9, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[:, :12], model(ids), rtol=0, atol=3e-5)


def test_every_weight_gets_a_gradient(model: CausalLM, ids: torch.Tensor) -> None:
    model(ids).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_recomputed_blocks_give_the_same_gradients(model: CausalLM, ids: torch.Tensor) -> None:
    gradients, kept = [], []
    for recompute in (False, True):
        model.model.recompute = recompute
        model.zero_grad(set_to_none=True)
        saved: list[int] = []

        def pack(x: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids).float().logsumexp(-1).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2, "blocks keep their input only"


def test_every_weight_of_a_score_model_gets_a_gradient(
    config: ModelConfig, ids: torch.Tensor
) -> None:
    model = ScoreModel(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    assert model(ids).abs().max() == 0, "a fresh head knows nothing"
    torch.nn.init.normal_(model.score.weight)
    model(ids).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_matrix(config: ModelConfig, tied: bool) -> None:
    model = CausalLM(config.model_copy(update={"tie_word_embeddings": tied}))
    assert model.model.embeddings.weight.shape == (config.vocab_size, config.hidden_size)
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied


def test_initialization_is_a_function_of_the_generator(config: ModelConfig) -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        model = CausalLM(config)
        initialize(model, config, torch.Generator().manual_seed(seed))
        return model.state_dict()

    one, same, other = made(3), made(3), made(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_initial_spread(config: ModelConfig) -> None:
    wide = config.model_copy(update={"hidden_size": 256, "num_hidden_layers": 8})
    model = CausalLM(wide)
    initialize(model, wide, torch.Generator().manual_seed(0))
    writes = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
    for name, weight in model.model.blocks[0].named_parameters():
        if weight.dim() == 2:
            # Sixteen matrices write into the residual stream; 1 / sqrt(16) is a quarter.
            spread = 0.075 if name.endswith(writes) else 0.3
            assert weight.std().item() == pytest.approx(spread, rel=0.05), name
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name


def test_flops_are_those_that_torch_counts(model: CausalLM, config: ModelConfig) -> None:
    context = 48
    ids = torch.zeros(2, context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "bmm" in op)
    # Torch computes the hidden half of the scores as well; ours counts what is needed.
    needed = sum(counts.values()) - attention / 2
    config = config.model_copy(update={"sliding_window": None})  # and what windows hide
    assert config.flops_per_token(context) * ids.numel() == pytest.approx(needed, rel=0.03)


def test_a_pass_forward_is_a_third_of_the_flops(config: ModelConfig) -> None:
    assert config.flops_per_token(32) == 3 * config.flops_per_token(32, backward=False)


def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    forms: list[dict[str, object]] = [{}, {"tie_word_embeddings": False}]
    if config.family in ("llama", "qwen3", "qwen3_moe"):
        forms.append({"attention_bias": True})
    if config.family == "llama":
        forms.append({"attention_bias": True, "mlp_bias": True})
    if config.family == "qwen3_moe":
        forms += [{"decoder_sparse_step": 2}, {"mlp_only_layers": (1,)}]
    for form in forms:
        changed = config.model_copy(update=form)
        assert changed.parameters() == sum(p.numel() for p in CausalLM(changed).parameters()), form


def test_matrix_parameters_are_those_of_products(model: CausalLM, config: ModelConfig) -> None:
    # Tied: the one table serves as the head, whose product counts. Of four experts two are asked.
    expected = sum(
        p.numel() / (2 if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if p.dim() == 2 and "wpe" not in name
    )
    assert config.matrix_parameters() == expected


@pytest.mark.parametrize(("window", "context"), [(5, 12), (1, 12), (12, 12), (40, 12), (5, 1)])
def test_a_window_saves_the_products_that_it_hides(window: int, context: int) -> None:
    shape = ModelConfig(family="mistral", sliding_window=window)
    seen = sum(min(query + 1, window) for query in range(context)) / context
    open_seen = (context + 1) / 2
    width = shape.num_attention_heads * shape.head_dim
    whole = ModelConfig(family="mistral").flops_per_token(context, backward=False)
    saved = whole - shape.flops_per_token(context, backward=False)
    # The formula counts a query's own token half, as it counts half of the square.
    expected = 4 * shape.num_hidden_layers * width * (open_seen - seen)
    assert saved == pytest.approx(expected, abs=4 * shape.num_hidden_layers * width)
