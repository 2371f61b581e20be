"""What only a GPU can show: launches that do not wait, on the stream of the caller, at full size. Run with `pytest -m gpu`.

The contract itself runs there too: test_contract.py and others, the parameters that end in "-gpu".
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gate.record import cast, rows, with_kernels
from implementations import Implementation
from oracle import failures, run, same_bits

pytestmark = pytest.mark.gpu

every_op = pytest.mark.parametrize("op", with_kernels(), ids=lambda op: op.name)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def calls(op, dtype=torch.float32):
    """(label, case) of the op's rows on the device."""
    for label, case in rows(op):
        yield label, Implementation(op, "gpu").on_device(cast(case, dtype))


def forward_and_backward(op, case, pulls):
    """The gradients (the results where there are none) for these grad_outputs; draws them if there are none yet."""
    leaves = [arg.detach().requires_grad_(place in case.grads) if isinstance(arg, torch.Tensor) else arg for place, arg in enumerate(case.args)]
    results = op(*case.packed(leaves))
    outputs = [out for out in results if out.requires_grad]
    if not pulls:
        pulls += [torch.randn_like(out) for out in outputs]
    return torch.autograd.grad(outputs, [leaves[place] for place in case.grads], pulls) if outputs else results


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_at_full_size(op, dtype):
    for label, case in calls(op, dtype):
        assert failures(op, case) == [], label


@every_op
def test_two_runs_give_the_same_bits(op):
    for label, case in calls(op, torch.bfloat16):
        one, other = run(op, case, case.args), run(op, case, case.args)
        for a, b in zip((*one.outputs, *one.grads), (*other.outputs, *other.grads), strict=True):
            assert (a is None and b is None) or same_bits(a, b), label


@every_op
def test_launches_do_not_wait(op):
    for _, case in calls(op):
        pulls: list[torch.Tensor] = []
        forward_and_backward(op, case, pulls)  # Compiles.
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_and_backward(op, case, pulls)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_op
def test_launches_are_on_the_stream_of_the_caller(op):
    for label, case in calls(op):
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
            found = forward_and_backward(op, dataclasses.replace(case, args=tuple(late)), pulls)
        stream.synchronize()
        assert all(map(same_bits, expected, found)), label


@every_op
def test_launches_can_be_captured_in_a_graph(op):
    for label, case in calls(op):
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
        assert all(map(same_bits, expected, found)), label


@every_op
def test_launches_are_on_the_device_of_the_tensors(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    for label, case in calls(op):
        there = dataclasses.replace(case, args=tuple(arg.to("cuda:1") if isinstance(arg, torch.Tensor) else arg for arg in case.args))
        expected = forward_and_backward(op, case, pulls := [])
        found = forward_and_backward(op, there, [pull.to("cuda:1") for pull in pulls])
        assert all(same_bits(a, b.to(a.device)) for a, b in zip(expected, found, strict=True)), label
