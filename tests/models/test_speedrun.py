import torch
import torch.nn.functional as F

from dltrain.models.speedrun import Speedrun, Start, whitening


def test_the_first_layer_makes_patches_white():
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(200, 3, 36, 36), 5, 1)  # neighbours that are alike
    weight = whitening(images, eps=0.0)
    out = F.conv2d(images, weight, stride=2).transpose(0, 1).flatten(1)[:12]
    torch.testing.assert_close(out @ out.T / out.shape[1], torch.eye(12), atol=1e-3, rtol=0)
    assert weight.shape == (24, 3, 2, 2) and torch.equal(weight[:12], -weight[12:])
    torch.testing.assert_close(whitening(images.flip(0), eps=0.0), weight, atol=1e-3, rtol=1e-3)  # signs are fixed


def test_sizes_and_what_is_fixed():
    with torch.device("meta"):
        net = Speedrun(10)
        assert net(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 1_972_792
    fixed = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert "whiten.weight" in fixed and all("norm" in name and "weight" in name for name in fixed - {"whiten.weight"})
    assert len(fixed) == 7


def test_a_convolution_begins_as_a_copy_of_its_input():
    conv = Start(24, 48)
    h = torch.randn(1, 24, 8, 8)
    torch.testing.assert_close(conv(h)[:, :24], h)
