"""Trained models made ready to read: the same answers, within rounding, for less work."""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def ready_to_read(model: nn.Module) -> nn.Module:
    """Prepare a model in evaluation mode, in place, that is not trained any more.

    Each convolution takes over the norm that follows it, and a ReLU that follows both; convolutions and linear layers
    become their packed kind.
    """
    model.eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        kinds = [type(module) for module in sequence]
        if kinds[:2] == [nn.Conv2d, nn.BatchNorm2d]:
            sequence[0], sequence[1] = fuse_conv_bn_eval(sequence[0], sequence[1]), nn.Identity()
    for module in model.modules():
        if type(module) in _PACKED:
            module.__class__ = _PACKED[type(module)]
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        if [type(module) for module in sequence] == [PackedConvolution, nn.Identity, nn.ReLU]:
            sequence[0].activation, sequence[2] = "relu", nn.Identity()
    return model.to(memory_format=torch.channels_last)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")
)


class _Packed:
    """A layer that on a CPU keeps its weights as oneDNN lays them out, and calls oneDNN itself.

    PyTorch hands small convolutions of one image to a slow kernel, lays out the weights of the others anew in every
    pass, and takes linear layers to a library that some processors run at half their rate: one cell takes 1.4 times as
    long. The operators are those that `torch.compile` uses on CPUs; where they are missing, and wherever a pass is
    recorded, compiled or on a card, the layer is an ordinary one.
    """

    _weights: Tensor | None = None

    def _packs(self, inputs: Tensor) -> bool:
        return (
            inputs.device.type == "cpu"
            and inputs.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and _HAS_ONEDNN
        )

    def __getstate__(self) -> dict:
        # What is packed can neither be copied nor stored, and is soon packed again.
        return {key: value for key, value in self.__dict__.items() if key != "_weights"}


class PackedConvolution(_Packed, nn.Conv2d):
    """A convolution, and the activation that follows it, "none" or "relu"; see `_Packed`."""

    activation = "none"

    def forward(self, images: Tensor) -> Tensor:
        if not self._packs(images):
            features = super().forward(images)
            return torch.relu(features) if self.activation == "relu" else features
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        if self._weights is None:
            weight = self.weight.detach().contiguous().to_mkldnn()
            self._weights = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *geometry, list(images.shape))
        return torch.ops.mkldnn._convolution_pointwise(
            images, self._weights, self.bias, *geometry, self.activation, [], ""
        )


class PackedLinear(_Packed, nn.Linear):
    """A linear layer; see `_Packed`."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self._packs(inputs):
            return super().forward(inputs)
        if self._weights is None:
            rows = inputs.numel() // inputs.shape[-1]
            self._weights = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(inputs, self._weights, self.bias, "none", [], "")


_PACKED = {nn.Conv2d: PackedConvolution, nn.Linear: PackedLinear}
