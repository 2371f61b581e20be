"""What only a GPU can show: launches that do not wait, on the stream of the caller, at full size. Run with `pytest -m gpu`.

The contract itself runs there too: test_contract.py, the parameters that end in "-gpu".
"""

from __future__ import annotations

import pytest
import torch
from gate.record import cast, rows, with_kernels
from implementations import Implementation
from oracle import Run, failures, run, same_bits

pytestmark = pytest.mark.gpu

CALLS = [pytest.param(op, label, id=f"{op.name} {label}".strip()) for op in with_kernels() for label, _ in rows(op)]
every_row = pytest.mark.parametrize(("op", "label"), CALLS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(op, label, dtype=torch.float32):
    """A row of the op on the device."""
    return Implementation(op, "gpu").on_device(cast(dict(rows(op))[label], dtype))


def equal(one: Run, other: Run) -> bool:
    pairs = [*zip(one.outputs, other.outputs, strict=True), *zip(one.grads, other.grads, strict=True)]
    return all((a is None) == (b is None) and (a is None or same_bits(a, b)) for a, b in pairs)


@every_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_at_full_size(op, label, dtype):
    assert failures(op, on_gpu(op, label, dtype)) == []


@every_row
def test_two_runs_give_the_same_bits(op, label):
    case = on_gpu(op, label, torch.bfloat16)
    assert equal(run(op, case, case.args), run(op, case, case.args))


def forward_and_backward(op, case, pulls):
    leaves = [arg.detach().requires_grad_(place in case.grads) if isinstance(arg, torch.Tensor) else arg for place, arg in enumerate(case.args)]
    outputs = [out for out in op(*case.packed(leaves)) if out.requires_grad]
    if not pulls:
        pulls += [torch.randn_like(out) for out in outputs]
    return torch.autograd.grad(outputs, [leaves[place] for place in case.grads], pulls) if outputs else op(*case.packed(leaves))


@every_row
def test_launches_do_not_wait(op, label):
    case, pulls = on_gpu(op, label), []
    forward_and_backward(op, case, pulls)  # Compiles.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(op, case, pulls)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_row
def test_launches_are_on_the_stream_of_the_caller(op, label):
    case = on_gpu(op, label)
    expected = forward_and_backward(op, case, pulls := [])
    late = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for arg in late:  # A kernel on another stream reads zeros.
            if isinstance(arg, torch.Tensor):
                arg.zero_()
        torch.cuda._sleep(50_000_000)
        for arg, right in zip(late, case.args, strict=True):
            if isinstance(arg, torch.Tensor):
                arg.copy_(right)
        found = forward_and_backward(op, type(case)(tuple(late), case.grads, lists=case.lists), pulls)
    stream.synchronize()
    assert all(map(same_bits, expected, found))


@every_row
def test_launches_can_be_captured_in_a_graph(op, label):
    case = on_gpu(op, label)
    expected = forward_and_backward(op, case, pulls := [])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward(op, case, pulls)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward_and_backward(op, case, pulls)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same_bits, expected, found))


@pytest.mark.parametrize("op", with_kernels(), ids=lambda op: op.name)
def test_launches_are_on_the_device_of_the_tensors(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    label, _ = next(rows(op))
    case = on_gpu(op, label)
    there = type(case)(tuple(arg.to("cuda:1") if isinstance(arg, torch.Tensor) else arg for arg in case.args), case.grads, lists=case.lists)
    expected, found = forward_and_backward(op, case, pulls := []), forward_and_backward(op, there, [pull.to("cuda:1") for pull in pulls])
    assert all(same_bits(a, b.to(a.device)) for a, b in zip(expected, found, strict=True))
