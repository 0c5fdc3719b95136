"""The emulated device is what it says: real numbers, strict places, counted waits."""

import copy
import io

import pytest
import torch

from tests.devices.emulated_device import waits

HERE = torch.device("emulated")


def test_numbers_are_the_cpus():
    x, w = torch.randn(5, 4), torch.randn(4, 3)
    results = []
    for place in ("cpu", HERE):
        a, b = x.to(place), w.to(place, copy=True).requires_grad_()
        loss = (a @ b).softmax(1).square().sum()
        loss.backward()
        results.append([loss.detach().cpu(), b.grad.cpu()])
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)


def test_views_share_memory():
    x = torch.zeros(3, 4, device=HERE)
    x[:, 1] = 1.0
    x.view(2, 6)[0] += 2
    x.T.unbind(0)[3].mul_(3)
    assert x.tolist() == [[2, 3, 2, 6], [2, 3, 0, 0], [0, 1, 0, 0]]
    assert x[1:].data_ptr() == x.data_ptr() + 16


def test_written_tensors_are_resized():
    out = torch.zeros(0, device=HERE)
    torch.cat([torch.ones(2, device=HERE), torch.zeros(1, device=HERE)], out=out)
    assert out.tolist() == [1, 1, 0]
    out.resize_(5)[3:] = 7
    assert out.tolist() == [1, 1, 0, 7, 7]


def test_optimisers_copies_and_files():
    model = torch.nn.Linear(3, 2).to(HERE)
    twin = copy.deepcopy(model).cpu()
    for each in (model, twin):
        optimizer = torch.optim.Adam(each.parameters(), fused=True)
        for _ in range(3):
            each(torch.ones(4, 3).to(each.weight)).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.weight.cpu(), twin.weight)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for place in ("cpu", "emulated"):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=place)
        assert loaded["weight"].device.type == place
        assert torch.equal(loaded["weight"].cpu(), twin.weight)


def test_function_transforms():
    def slope(w, x):
        return torch.func.grad(lambda w: (w * x).sin().sum())(w)

    w, x = torch.randn(2, 6, 3)
    on_device = torch.func.vmap(slope)(w.to(HERE), x.to(HERE))
    assert torch.equal(on_device.cpu(), torch.func.vmap(slope)(w, x))


MIXED = {
    "sum": lambda x, y: x + y,
    "written": lambda x, y: y.add_(x),
    "number that is written": lambda x, y: y.sum().add_(x.sum()),
    "product": lambda x, y: x @ y,
    "linear": torch.nn.functional.linear,
    "cat": lambda x, y: torch.cat([x, y]),
    "stack of numbers": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "gather": lambda x, y: x.gather(1, y.long()),
    "index_select": lambda x, y: x.index_select(0, torch.tensor([0])),
    "values at an index": lambda x, y: x.index_put_((torch.tensor([0]),), y[:1]),
    "indices of the device": lambda x, y: y[(x[0] > 0).nonzero()[:, 0]],
    "mask": lambda x, y: x.masked_fill(y > 0, 0.0),
    "generator": lambda x, y: torch.randn_like(x).normal_(generator=torch.Generator()),
    "generator of the device": lambda x, y: y.normal_(generator=torch.Generator(HERE)),
    "loss": torch.nn.functional.mse_loss,
    "maximum into": lambda x, y: torch.maximum(x, x, out=y),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_mix(name):
    with pytest.raises(RuntimeError, match=r"device|[Gg]enerator"):
        MIXED[name](torch.randn(3, 3, device=HERE), torch.zeros(3, 3))
    with pytest.raises(TypeError, match="numpy"):
        torch.zeros(2, device=HERE).numpy()


def test_numbers_and_indices_of_the_cpu_are_taken():
    x = torch.arange(3.0, device=HERE)
    two, index = torch.tensor(2.0), torch.tensor([2, 0])
    assert (x * two).tolist() == [0, 2, 4]
    assert torch.where(x > 1, x, two).tolist() == [2, 2, 2]
    assert x.masked_fill(x > 0, two).tolist() == [0, 2, 2]
    assert x[index].tolist() == [2, 0]
    assert x.index_put((index,), two).tolist() == [2, 1, 2]


def test_generators_of_the_device():
    draws = [
        torch.randn(4, generator=torch.Generator(place).manual_seed(3), device=place)
        for place in ("cpu", HERE, HERE)
    ]
    assert torch.equal(draws[0], draws[1].cpu())
    assert torch.equal(draws[1], draws[2])


WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "from the cpu": lambda x: x.copy_(torch.zeros(4)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=HERE),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "values at a mask": lambda x: x.index_put_((x > 0,), x[:1].expand(4)[x > 0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(minlength=3),
    "repeats": lambda x: x.repeat_interleave(torch.ones_like(x).long()),
    "list": lambda x: x[[0, 1]],
    "number as index": lambda x: x[x.argmax()],
    "equal": lambda x: torch.equal(x, x.clone()),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2 + x.exp() / 3 - torch.tensor(2.0)).clamp(min=0).sum(),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "filled by a mask": lambda x: x.masked_fill(x > 0, 0.0),
    "set by a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "gathered": lambda x: x[x.argsort()],
    "made": lambda x: torch.zeros(3, device=HERE) + torch.arange(3, device=HERE),
    "drawn": lambda x: torch.randn_like(x) + torch.rand(4, device=HERE),
    "not blocking": lambda x: x.copy_(torch.zeros(4), non_blocking=True),
    "another type": lambda x: x.double().to(torch.bfloat16),
    "sorted": lambda x: x.topk(2).values.cumsum(0),
    "repeated": lambda x: x.repeat_interleave(3),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_waits_for_is_counted(name):
    x = torch.arange(4.0, device=HERE)
    with waits() as found:
        WAITS[name](x)
    assert found


@pytest.mark.parametrize("name", NO_WAITS)
def test_nothing_else_is_counted(name):
    x = torch.arange(4.0, device=HERE)
    with waits() as found:
        NO_WAITS[name](x)
    assert found == []
