"""reconstruction_loss: every provider against F.binary_cross_entropy_with_logits in float64 and in the same dtype."""

from __future__ import annotations

import column
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext.ops import providers, reconstruction_loss

OP = "reconstruction_loss"
SHAPES = [(2, 3, 8, 8), (3, 5, 7, 9), (1, 1, 1, 1), (5, 3, 1, 1), (4, 1, 3, 5), (2, 3, 37, 29), (2, 130, 3, 3)]


def composition(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The ops of torch that the op stands for, the pixels restored in float32 at least as the op does."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mean, std = (values.to(wide).view(1, -1, 1, 1) for values in (mean, std))
    pixels = (image.to(wide) * std + mean).clamp(0, 1)
    return F.binary_cross_entropy_with_logits(logits, pixels.to(logits.dtype))


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, image_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits on both sides of zero, and an image some of whose pixels lie outside [0, 1] when they are restored."""
    mean, std = torch.rand(shape[1], device=device), 0.1 + torch.rand(shape[1], device=device)
    logits, image = 3 * torch.randn(shape, device=device), torch.randn(shape, device=device)
    return logits.to(dtype), image.to(image_dtype), mean, std


def compare(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor, provider: str) -> None:
    """Loss and gradient against the composition in float64 and in the logits' dtype."""
    leaf = logits.detach().requires_grad_()
    ours = reconstruction_loss(leaf, image, mean, std, provider=provider)
    (grad,) = torch.autograd.grad(ours * 3, leaf)

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        other = logits.detach().to(dtype).requires_grad_()
        loss = composition(other, image, mean, std)
        return loss, torch.autograd.grad(loss * 3, other)[0]

    (same, same_grad), (oracle, oracle_grad) = run(logits.dtype), run(torch.float64)
    assert ours.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    column.assert_close("loss", ours, same, oracle)
    column.assert_close("gradient", grad, same_grad, oracle_grad)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, dtype, device), provider)


@column.cases
@column.dtypes
@pytest.mark.parametrize("image_dtype", column.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes_of_the_image(
    device: str, provider: str, dtype: torch.dtype, image_dtype: torch.dtype, poison: None
) -> None:
    compare(*inputs((2, 3, 8, 12), dtype, device, image_dtype), provider)


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_layouts_of_the_logits(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    logits, *rest = inputs((4, 3, 8, 8), dtype, device)
    compare(column.LAYOUTS[layout](logits), *rest, provider)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("logits_layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_layouts_of_the_image(
    device: str, provider: str, dtype: torch.dtype, logits_layout: str, layout: str, poison: None
) -> None:
    logits, image, mean, std = inputs((4, 3, 8, 8), dtype, device, dtype)
    compare(column.LAYOUTS[logits_layout](logits), column.LAYOUTS[layout](image), mean, std, provider)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "column-slice", "transposed"])
@pytest.mark.parametrize("shape", [(2, 3, 53, 53), (40, 3, 8, 8), (3, 1100, 2, 2)], ids=str)
def test_maps_larger_than_one_pass_of_a_block(
    device: str, provider: str, layout: str, shape: tuple[int, ...], poison: None
) -> None:
    logits, image, mean, std = inputs(shape, torch.float32, device)
    compare(column.LAYOUTS[layout](logits), image, mean, std, provider)
    compare(logits, column.LAYOUTS[layout](image), mean, std, provider)


@column.cases
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_gradient_lies_as_the_logits(device: str, provider: str, layout: str) -> None:
    logits, *rest = inputs((4, 3, 8, 8), torch.float16, device)
    leaf = column.LAYOUTS[layout](logits).detach().requires_grad_()
    made = column.op(OP, provider)(leaf, *rest, True)[1]
    (grad,) = torch.autograd.grad(reconstruction_loss(leaf, *rest, provider=provider), leaf)
    last = leaf.stride(1) == 1 and not leaf.is_contiguous()
    format = torch.channels_last if last else torch.contiguous_format
    assert made.is_contiguous(memory_format=format) and grad.is_contiguous(memory_format=format)


@column.cases
@pytest.mark.parametrize("sign", [1, -1])
def test_sure_logits_keep_their_digits(device: str, provider: str, sign: int) -> None:
    """Where the pixel lies at the end that the logit points to, the gradient is e^-|l| and so is the loss."""
    if provider in ("reference", "aten"):
        pytest.skip("torch's formula loses them")
    size = torch.arange(1.0, 81.0, device=device).view(1, 1, 8, 10)
    pixels = torch.full_like(size, float(sign > 0))
    mean, std = torch.zeros(1, device=device), torch.ones(1, device=device)
    grad = column.op(OP, provider)(sign * size, pixels, mean, std, True)[1]
    torch.testing.assert_close(-sign * grad, torch.sigmoid(-size.double()).float(), rtol=1e-6, atol=0)
    for one, pixel in ((size[..., r : r + 1, c : c + 1], pixels[..., :1, :1]) for r, c in ((0, 0), (3, 9), (7, 9))):
        loss = reconstruction_loss(sign * one, pixel, mean, std, provider=provider)
        torch.testing.assert_close(loss, F.softplus(-one.double()).float().squeeze(), rtol=1e-6, atol=0)


@column.cases
@column.dtypes
def test_huge_logits_stay_finite(device: str, provider: str, dtype: torch.dtype, poison: None) -> None:
    logits, *rest = inputs((2, 3, 8, 8), torch.float32, device)
    compare((logits * 1e4).clamp(-6e4, 6e4).to(dtype), *rest, provider)


@column.cases
@pytest.mark.parametrize("of", ["logits", "image"])
def test_nan_is_passed_on(device: str, provider: str, of: str) -> None:
    logits, image, mean, std = inputs((2, 3, 8, 8), torch.float32, device)
    (logits if of == "logits" else image)[1, 2, 3, 4] = float("nan")
    loss, grad = column.op(OP, provider)(logits, image, mean, std, True)
    assert loss.isnan() and grad[1, 2, 3, 4].isnan() and int(grad.isnan().sum()) == 1


@column.cases
def test_pixels_are_cut_to_their_range(device: str, provider: str) -> None:
    logits = torch.zeros(1, 2, 2, 2, device=device)
    image = torch.tensor([[-3.0, -0.5, 0.5, 3.0], [-1.0, 0.0, 1.0, 0.25]], device=device).view(1, 2, 2, 2)
    mean, std = torch.tensor([0.5, 0.0], device=device), torch.tensor([0.5, 1.0], device=device)
    grad = column.op(OP, provider)(logits, image, mean, std, True)[1]
    assert grad.flatten().tolist() == [0.5, 0.25, -0.25, -0.5, 0.5, 0.5, -0.5, 0.25]


@column.cases
def test_only_logits_get_a_gradient(device: str, provider: str, poison: None) -> None:
    logits, *others = inputs((2, 3, 8, 8), torch.float32, device)
    with column.GradientNeeds(OP) as calls:
        others = [tensor.requires_grad_() for tensor in others]
        loss = reconstruction_loss(logits, *others, provider=provider)
        assert calls.needs == [False]
        if loss.requires_grad:
            assert torch.autograd.grad(loss, others, allow_unused=True) == (None, None, None)
        logits.requires_grad_()
        loss = reconstruction_loss(logits, *others, provider=provider)
        assert calls.needs == [False, True]
        grads = torch.autograd.grad(loss, [logits, *others], allow_unused=True)
        assert grads[0] is not None and grads[1:] == (None, None, None)
        with torch.no_grad():
            alone = reconstruction_loss(logits, *others, provider=provider)
        assert calls.needs == [False, True, False] and alone.grad_fn is None
    assert torch.equal(alone, loss)
    made = column.op(OP, provider)(logits.detach(), *others, False)[1]
    assert made.numel() == 0
    with pytest.raises(RuntimeError, match="need_grad"):
        column.op(OP, provider)(logits, *others, False)[0].backward()


@column.cases
@column.dtypes
def test_only_the_gradient_is_kept(device: str, provider: str, dtype: torch.dtype) -> None:
    logits, *rest = inputs((2, 3, 8, 8), dtype, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        reconstruction_loss(logits.requires_grad_(), *rest, provider=provider)
    (grad,) = kept
    assert grad.shape == logits.shape and grad.dtype == dtype
    assert grad.data_ptr() != logits.data_ptr() and grad.abs().max() <= 1


@column.cases
def test_bitwise_repeatable(device: str, provider: str) -> None:
    logits, *rest = inputs((20, 3, 33, 31), torch.float32, device)

    def once() -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = reconstruction_loss(leaf, *rest, provider=provider)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    assert all(torch.equal(first, again) for first, again in zip(once(), once(), strict=True))


def test_threads_do_not_change_the_bits() -> None:
    column.need("cpu", "cpu")
    tensors = inputs((20, 3, 33, 31), torch.float32, "cpu")
    threads, losses = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            losses.append(reconstruction_loss(*tensors, provider="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_gradcheck(provider: str, layout: str) -> None:
    logits, *rest = inputs((2, 3, 2, 3), torch.float64, "cpu")
    leaf = column.LAYOUTS[layout](logits).detach().requires_grad_()
    torch.autograd.gradcheck(lambda x: reconstruction_loss(x, *rest, provider=provider), leaf)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "column-slice"])
def test_opcheck(device: str, provider: str, layout: str) -> None:
    logits, *rest = inputs((2, 3, 4, 5), torch.float32, device)
    logits = column.LAYOUTS[layout](logits).detach()
    torch.library.opcheck(column.op(OP, provider), (logits.requires_grad_(), *rest, True))
    torch.library.opcheck(column.op(OP, provider), (logits.detach(), *rest, False))


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiles_as_one_graph(device: str, provider: str, dtype: torch.dtype) -> None:
    logits, *rest = inputs((2, 3, 4, 5), dtype, device)

    def step(x: Tensor, image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return reconstruction_loss(x * 2, image + 1, mean, std, provider=provider)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (logits.detach().requires_grad_() for _ in range(2))
    out, wanted = compiled(found, *rest), step(expected, *rest)
    (out * 2).backward()
    (wanted * 2).backward()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(found.grad, expected.grad)


def test_automatic_choice_compiles() -> None:
    tensors = inputs((2, 3, 4, 5), torch.float32, "cpu")
    compiled = torch.compile(reconstruction_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), composition(*tensors))


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, dtype=torch.float16, device=device, requires_grad=True)
        image, values = torch.empty(2, 3, 4, 5, device=device), torch.empty(3, device=device)
        leaf = x.to(memory_format=torch.channels_last)
        loss = reconstruction_loss(leaf, image, values, values, provider=provider)
        (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.shape == () and loss.dtype == torch.float32
    assert grad.shape == x.shape and grad.dtype == torch.float16
    assert grad.is_contiguous(memory_format=torch.channels_last)


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_changes_nothing(device: str, provider: str, low: torch.dtype) -> None:
    for dtype in (torch.float32, low):
        logits, *rest = inputs((2, 3, 8, 8), dtype, device)
        leaf, other = (logits.detach().requires_grad_() for _ in range(2))
        with torch.autocast(device, low):
            loss = reconstruction_loss(leaf, *rest, provider=provider)
        expected = reconstruction_loss(other, *rest, provider=provider)
        assert loss.dtype == torch.float32 and torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(out, x)[0] for out, x in ((loss, leaf), (expected, other))))


@column.cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    logits, *rest = inputs((12, 3, 64, 64), torch.float16, device)
    leaf, exact = logits.detach().requires_grad_(), logits.double().requires_grad_()
    (reconstruction_loss(leaf, *rest, provider=provider) * 65536).backward()
    (composition(exact, *rest) * 65536).backward()
    column.assert_close("gradient", leaf.grad, exact.grad.half(), exact.grad)
    # The same gradient, unscaled, is mostly below what float16 holds with all its digits.
    assert ((exact.grad / 65536).abs() < 6e-5).all() and (leaf.grad != 0).float().mean() > 0.9


@column.cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_scale_is_not_rounded_to_16_bits(device: str, provider: str, dtype: torch.dtype) -> None:
    logits, *rest = inputs((2, 3, 8, 8), dtype, device)
    leaf = logits.detach().requires_grad_()
    loss = reconstruction_loss(leaf, *rest, provider=provider)
    scale = 1 + 3 / 4096  # 1 in bfloat16, 1 + 4 / 4096 in float16
    (grad,) = torch.autograd.grad(loss * scale * leaf.numel(), leaf)
    made = column.op(OP, provider)(logits, *rest, True)[1]
    assert torch.equal(grad, (made.double() * scale).to(dtype))


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    logits, *rest = inputs((2, 3, 8, 8), torch.float32, device)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(reconstruction_loss(logits, *rest, provider=provider), logits, create_graph=True)
    loss = reconstruction_loss(logits, *rest, provider=provider)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    again = torch.autograd.grad(loss, logits)
    assert torch.equal(first[0], again[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@column.cases
def test_vectors_of_any_floating_dtype(device: str, provider: str) -> None:
    logits, image, mean, std = inputs((2, 3, 8, 8), torch.float32, device)
    expected = reconstruction_loss(logits, image, mean, std, provider=provider)
    strided = torch.stack([mean.double(), std.double()], 1)
    assert torch.equal(reconstruction_loss(logits, image, *strided.unbind(1), provider=provider), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(4, 3)}, ValueError, r"expected logits of shape \(N, C, H, W\)"),
        ({"logits": torch.zeros(0, 3, 4, 5)}, ValueError, "with elements"),
        ({"image": torch.zeros(2, 3, 5, 4)}, ValueError, r"expected image \(2, 3, 4, 5\) as logits"),
        ({"image": torch.zeros(1, 3, 4, 5)}, ValueError, "expected image"),
        ({"mean": torch.zeros(1, 3, 1, 1)}, ValueError, r"expected mean of shape \(3,\)"),
        ({"std": torch.zeros(1)}, ValueError, r"expected std of shape \(3,\)"),
        ({"image": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "expected image on cpu"),
        ({"std": torch.zeros(3, device="meta")}, ValueError, "expected std on cpu"),
        ({"logits": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "expected logits in float16"),
        ({"image": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, TypeError, "expected image in float16"),
        ({"mean": torch.zeros(3, dtype=torch.int64)}, TypeError, "expected mean in float16"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    names = ("logits", "image", "mean", "std")
    arguments = {**dict(zip(names, inputs((2, 3, 4, 5), torch.float32, "cpu"), strict=True)), **changes}
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=message):
        reconstruction_loss(*positional, **arguments)


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    logits, *rest = inputs((256, 3, 64, 64), torch.float32, device)
    column.assert_follows_the_stream(lambda x: [reconstruction_loss(x, *rest, provider=provider)], logits)


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    logits, *rest = inputs((16, 3, 32, 32), torch.bfloat16, device)
    logits.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = reconstruction_loss(logits, *rest, provider=provider)
        return loss, torch.autograd.grad(loss, logits)[0]

    column.assert_replays(step, logits)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((2, 3, 8, 8), torch.float32, other), provider)
    )


@pytest.mark.large
@column.gpu_cases
def test_more_than_two_billion_elements(device: str, provider: str) -> None:
    logits = torch.randn(11, 3, 8192, 8192, device=device, dtype=torch.float16)
    assert logits.numel() > 2**31
    mean, std = torch.zeros(3, device=device), torch.ones(3, device=device)
    expected = sum(composition(x.float()[None], -x[None], mean, std) for x in logits) / len(logits)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = (-logits).contiguous(memory_format=layout)
        loss, grad = column.op(OP, provider)(logits, image, mean, std, True)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        last = logits[-1].float()
        torch.testing.assert_close(grad[-1], (last.sigmoid() - (-last).clamp(0, 1)).half(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compiled_provider_is_there(name: str) -> None:
    column.need(name, name)
    assert providers.available(name)
