"""Convolution of events with the pooling behind it, in plain PyTorch: the specification of `ops/event_conv.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_backend.reference.events import gather, scatter

NO_POOL, MAX_POOL, AVERAGE_POOL = 0, 1, 2


class Geometry(NamedTuple):
    """How an image becomes a current: sizes in (down, across) order, as the op takes them one by one.

    Windows of the pooling lie side by side; what does not fill one at the edge is left out.
    """

    height: int  #: of the input
    width: int
    stride_h: int = 1
    stride_w: int = 1
    padding_h: int = 0
    padding_w: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    pool: int = NO_POOL
    pool_h: int = 1
    pool_w: int = 1

    def of_convolution(self, weight: Tensor) -> tuple[int, int]:
        """Height and width before pooling. weight: [O, C, kh, kw]"""
        kernel_h, kernel_w = weight.shape[2:]
        return (
            (self.height + 2 * self.padding_h - self.dilation_h * (kernel_h - 1) - 1) // self.stride_h + 1,
            (self.width + 2 * self.padding_w - self.dilation_w * (kernel_w - 1) - 1) // self.stride_w + 1,
        )

    def of_output(self, weight: Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = self.of_convolution(weight)
        return height // self.pool_h, width // self.pool_w

    def convolve(self, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """image: [R, C, H, W] -> [R, O, H', W'], before pooling."""
        stride, padding = (self.stride_h, self.stride_w), (self.padding_h, self.padding_w)
        return F.conv2d(image, weight, bias, stride, padding, (self.dilation_h, self.dilation_w))

    def windows(self, plane: Tensor) -> Tensor:
        """[R, O, H', W'] -> [R, O, H'', W'', entries of a window line by line]"""
        height, width = plane.shape[2] // self.pool_h, plane.shape[3] // self.pool_w
        whole = plane[:, :, : height * self.pool_h, : width * self.pool_w]
        parts = whole.unflatten(3, (width, self.pool_w)).unflatten(2, (height, self.pool_h))
        return parts.transpose(3, 4).flatten(4)

    def from_windows(self, parts: Tensor, weight: Tensor) -> Tensor:
        """The reverse, zeros where no window reaches."""
        height, width = self.of_convolution(weight)
        plane = parts.new_zeros(*parts.shape[:2], height, width)
        whole = parts.unflatten(4, (self.pool_h, self.pool_w)).transpose(3, 4).flatten(4).flatten(2, 3)
        plane[:, :, : whole.shape[2], : whole.shape[3]] = whole
        return plane


def event_conv(
    row_ptr: Tensor,  # [R + 1]
    indices: Tensor,  # columns below C * H * W
    values: Tensor | None,
    handle: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    weight: Tensor,  # [O, C, kh, kw]
    bias: Tensor | None,  # [O]
    *options: int,
) -> tuple[Tensor, Tensor]:
    """Output [R, O * H' * W'], and of each maximum its place in its window, line by line, where kept."""
    geometry, keep = Geometry(*options[:-1]), bool(options[-1])
    columns = weight.shape[1] * geometry.height * geometry.width
    image = scatter(row_ptr, indices, values, columns, weight.dtype)
    plane = geometry.convolve(image.view(-1, weight.shape[1], geometry.height, geometry.width), weight, bias)
    out, chosen = plane, plane.new_empty(0, plane[0].numel() if len(plane) else 0, dtype=torch.uint8)
    if geometry.pool != NO_POOL:
        windows = geometry.windows(plane)
        out = windows.mean(-1) if geometry.pool == AVERAGE_POOL else windows.amax(-1)
        if geometry.pool == MAX_POOL and keep:
            # The first of equals, the last that is no number, as torch's pooling has it; argmax promises neither.
            size = windows.shape[-1]
            order = torch.arange(size, device=windows.device)
            of_equals = torch.where(windows == out.unsqueeze(-1), size - order, 0)
            chosen = torch.where(windows.isnan(), size + order, of_equals).argmax(-1).to(torch.uint8)
    rows, outputs = row_ptr.numel() - 1, weight.shape[0] * out.shape[2] * out.shape[3]
    return out.reshape(rows, outputs), chosen.reshape(rows if chosen.numel() else 0, outputs)


def event_conv_backward(
    grad: Tensor,  # [R, O * H' * W']
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    weight: Tensor,
    chosen: Tensor | None,
    *options: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input's active entries [n_active], weight and bias; empty where not needed."""
    geometry = Geometry(*options[:-3])
    need_input, need_weight, need_bias = options[-3:]
    out_channels, channels = weight.shape[:2]
    grad = grad.reshape(-1, out_channels, *geometry.of_output(weight))
    plane = grad
    if geometry.pool == MAX_POOL:
        assert chosen is not None
        parts = grad.new_zeros(*grad.shape, geometry.pool_h * geometry.pool_w)
        parts.scatter_(-1, chosen.view(grad.shape).long().unsqueeze(-1), grad.unsqueeze(-1))
        plane = geometry.from_windows(parts, weight)
    elif geometry.pool == AVERAGE_POOL:
        window = geometry.pool_h * geometry.pool_w
        plane = geometry.from_windows((grad / window).unsqueeze(-1).expand(*grad.shape, window), weight)
    grad_input, grad_weight, grad_bias = (grad.new_empty(0) for _ in range(3))
    image_shape = (grad.shape[0], channels, geometry.height, geometry.width)
    settings = (
        (geometry.stride_h, geometry.stride_w),
        (geometry.padding_h, geometry.padding_w),
        (geometry.dilation_h, geometry.dilation_w),
    )
    if need_input:
        assert active_ptr is not None and active_indices is not None
        of_image = torch.nn.grad.conv2d_input(image_shape, weight, plane, *settings)
        grad_input = gather(of_image.flatten(1), active_ptr, active_indices)
    if need_weight:
        image = scatter(row_ptr, indices, values, channels * geometry.height * geometry.width, grad.dtype)
        grad_weight = torch.nn.grad.conv2d_weight(image.view(image_shape), weight.shape, plane, *settings)
    if need_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias
