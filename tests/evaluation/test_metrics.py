"""Perplexity against a brute-force reference, and over batches and processes."""

import math

import numpy as np
import pytest
import torch
from torch import multiprocessing

from lmlab.evaluation.metrics import perplexity
from lmlab.evaluation.scoring import MeanNLL


def test_sums_are_exact_where_float32_would_not_be() -> None:
    nll = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) + 10
    metric = MeanNLL()
    for part in nll.split(997):
        metric.update(part)
    exact = math.fsum(nll.tolist()) / len(nll)
    assert float(metric.compute()) == pytest.approx(exact, rel=1e-13)
    assert metric.compute().dtype == torch.float64
    assert int(metric.targets) == len(nll)


def test_batches_do_not_matter() -> None:
    nll = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    figures = set()
    for size in (1, 3, 64, 1000):
        metric = MeanNLL()
        for part in nll.split(size):
            metric.update(part)
        metric.update(nll[:0])  # a batch with nothing to score
        figures.add(round(float(metric.compute()), 12))
    assert len(figures) == 1


def test_mean_of_batch_means_is_not_it() -> None:
    metric = MeanNLL()
    metric.update(torch.tensor([1.0, 1.0, 1.0]))
    metric.update(torch.tensor([5.0]))
    assert float(metric.compute()) == 2.0


def test_reset_starts_anew() -> None:
    metric = MeanNLL()
    metric.update(torch.ones(3))
    metric.reset()
    metric.update(torch.tensor([2.0]))
    assert float(metric.compute()) == 2.0


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert perplexity(math.log(50265)) == pytest.approx(50265, rel=1e-12)
    assert perplexity(1000.0) == math.inf


def rank(number: int, address: str, results: multiprocessing.SimpleQueue) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=number, world_size=2)
    metric = MeanNLL()
    # Uneven on purpose: 5 targets here, 2 there.
    metric.update(torch.arange(5.0) if number == 0 else torch.tensor([10.0, 20.0]))
    results.put(float(metric.compute()))
    torch.distributed.destroy_process_group()


@pytest.mark.longest
def test_two_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    address = f"file://{tmp_path_factory.mktemp('gloo')}/rendezvous"
    ranks = [context.Process(target=rank, args=(i, address, results)) for i in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    np.testing.assert_allclose([results.get(), results.get()], 40 / 7)
