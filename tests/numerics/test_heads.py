"""The downstream classifier against the published one, and many at once against each alone."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.models.heads import HeadStack, MLPHead
from tests.numerics.det import det_images, det_init, golden

SEEDS = (3, 4, 9)
DIM, CLASSES, HIDDEN, BATCH = 10, 4, (8, 6), 7


def assert_published(head: MLPHead) -> None:
    numbers = golden("head_and_knn")
    det_init(head, 5)
    logits = head(det_images((3, 512), 6))
    assert logits.sum(1).tolist() == pytest.approx(numbers["mlp_logits_sum"], rel=1e-9)
    assert functional.cross_entropy(logits, torch.arange(3)).item() == pytest.approx(numbers["mlp_ce"], rel=1e-9)


def test_the_head_is_the_published_one() -> None:
    assert_published(MLPHead(512, 43).double().eval())


def test_a_head_that_drops_in_eval_or_lacks_a_relu_fails_the_same_check() -> None:
    class Linear(MLPHead):
        def forward(self, features: Tensor) -> Tensor:
            first, second, third = self.children()
            logits: Tensor = third(second(first(features)).relu())
            return logits

    for mutant in (MLPHead(512, 43).double().train(), Linear(512, 43).double().eval()):
        with pytest.raises(AssertionError):
            assert_published(mutant)


def alone(seed: int, hidden: tuple[int, ...]) -> MLPHead:
    torch.manual_seed(seed)
    return MLPHead(DIM, CLASSES, hidden, dropout=0.0).double()


def stack(hidden: tuple[int, ...]) -> HeadStack:
    return HeadStack(DIM, CLASSES, SEEDS, hidden, dropout=0.0).double()


def test_each_head_starts_as_it_would_alone_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    heads = HeadStack(DIM, CLASSES, SEEDS, HIDDEN)
    assert torch.get_rng_state().equal(state)
    for number, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        expected = MLPHead(DIM, CLASSES, HIDDEN).state_dict()
        found = heads.extract(number).state_dict()
        assert list(found) == list(expected) == [f"fc{i}.{name}" for i in (1, 2, 3) for name in ("weight", "bias")]
        assert all(found[key].equal(expected[key]) for key in expected)


@pytest.mark.parametrize("hidden", [(), (8,), HIDDEN, (8, 6, 5)], ids=str)
def test_a_head_of_any_depth_is_a_chain_of_products(hidden: tuple[int, ...]) -> None:
    heads, features = stack(hidden), det_images((BATCH, DIM), 0)
    logits = heads(features).detach().numpy()
    for number in range(len(SEEDS)):
        x = features.numpy()
        for layer in range(1, len(hidden) + 2):
            weight, bias = (
                heads.get_parameter(f"fc{layer}_{part}")[number].detach().numpy() for part in ("weight", "bias")
            )
            x = (np.maximum(x, 0) if layer > 1 else x) @ weight.T + bias
        np.testing.assert_allclose(logits[number], x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hidden", [(), (8,), HIDDEN, (8, 6, 5)], ids=str)
@pytest.mark.parametrize("own_inputs", [True, False], ids=["own inputs", "shared inputs"])
def test_heads_learn_together_what_each_learns_alone(own_inputs: bool, hidden: tuple[int, ...]) -> None:
    heads, singles = stack(hidden), [alone(seed, hidden) for seed in SEEDS]
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in (heads, *singles)]
    for step in range(5):
        features = det_images((len(SEEDS), BATCH, DIM) if own_inputs else (BATCH, DIM), step)
        labels = torch.arange(BATCH) % CLASSES
        logits = heads(features)
        assert logits.shape == (len(SEEDS), BATCH, CLASSES)
        losses = [functional.cross_entropy(row, labels) for row in logits]
        torch.stack(losses).sum().backward()
        for number, single in enumerate(singles):
            loss = functional.cross_entropy(single(features[number] if own_inputs else features), labels)
            assert losses[number].item() == pytest.approx(loss.item(), rel=1e-12)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for number, single in enumerate(singles):
        for key, value in heads.extract(number).state_dict().items():
            torch.testing.assert_close(value, single.state_dict()[key], rtol=1e-12, atol=1e-14)
        features = det_images((20, DIM), 99)
        assert heads.predict(number, features).equal(single(features).argmax(1))


def test_dropout_factors_replace_the_heads_own_draws() -> None:
    heads = HeadStack(DIM, CLASSES, SEEDS, HIDDEN, dropout=0.5).double().train()
    features = det_images((BATCH, DIM), 0)
    ones = torch.ones(len(SEEDS), BATCH, HIDDEN[0]).double()
    kept = heads(features, ones)
    assert kept.equal(heads.eval()(features))
    heads.train()
    drawn = heads(features)
    assert not drawn.equal(kept) and not drawn.equal(heads(features))
    ones[1] = 0
    dropped = heads(features, ones)
    assert dropped[0].equal(kept[0]) and (dropped[1] == dropped[1, :1]).all()  # head 1 sees nothing of its input
