"""Features, classes and GradCAM of a classifier against closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.inside import Opened, grad_cam, overlaid, signed_picture
from dist_defend.models.classifier import Classifier
from dist_defend.report import insides


class Pooled(nn.Module):
    """logits = V mean over places of W x, with W (2, 3) a 1x1 convolution and V (3, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(x).mean((2, 3)))
        return logits


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Pooled(), "pooled", 3, "none", image_size=4).double()


def test_grad_cam_is_the_class_weights_over_the_activations(model: Classifier) -> None:
    """d logit / d A_k is V[c, k] / HW everywhere, so the map is ReLU(sum over k of V[c, k] A_k), by its maximum."""
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    w, v = (model.net.get_parameter(f"{name}.weight").detach().numpy() for name in ("conv", "fc"))
    activations = np.einsum("kc,nchw->nkhw", w[:, :, 0, 0], images.numpy())
    best = (activations.mean((2, 3)) @ v.T).argmax(1)
    wanted = np.maximum(np.einsum("nk,nkhw->nhw", v[best], activations), 0)
    wanted = wanted / np.maximum(wanted.max((1, 2), keepdims=True), 1e-12)
    model.train()
    heat = grad_cam(model, images)
    assert heat is not None and model.training
    np.testing.assert_allclose(heat.numpy(), wanted, atol=1e-6)
    assert model.net.get_parameter("conv.weight").grad is None


def test_without_a_convolution_there_is_no_map() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    assert grad_cam(Classifier(net, "flat", 2, "none", image_size=4), torch.rand(2, 3, 4, 4)) is None


def test_what_enters_the_last_linear_layer_is_the_feature(model: Classifier) -> None:
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        pooled = model.net.get_submodule("conv")(images).mean((2, 3)).numpy()
        both = Opened(model)(images).numpy()
    np.testing.assert_allclose(both[:, :2], pooled / np.linalg.norm(pooled, axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(both[:, 2:], pooled @ model.net.get_parameter("fc.weight").detach().numpy().T, rtol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_heat_lies_over_a_darker_image() -> None:
    image = np.full((1, 1, 3, 3), 100, np.uint8)
    mixed = overlaid(image, torch.tensor([[[0.0, 0.5, 1.0]]]))
    assert mixed.tolist() == [[[[50, 50, 50], [178, 50, 50], [178, 178, 50]]]]  # 50 + 127.5


def test_a_perturbation_is_grey_where_it_is_nothing() -> None:
    shown = signed_picture(torch.tensor([[[0.0, -2.0]], [[1.0, 2.0]], [[0.0, 0.0]]]))
    assert shown.tolist() == [[[128, 191, 128], [0, 255, 128]]]


def test_confusion_has_labels_in_rows() -> None:
    counts = insides.confusion(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
