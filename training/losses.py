"""Losses of both stages beyond one line: classification, perceptual distance, PatchGAN, MSE per
timestep band."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

Classification = Literal["ce", "bce"]
"""Cross-entropy of one kind per photo, or binary cross-entropy of each kind for mixed ones."""

VGG_FILE = "vgg16-397923af.pth"
"""torchvision's name of LPIPS's backbone in the torch hub cache."""


def band_means(
    values: Tensor, timestep: Tensor, timesteps: int, bands: int = 4
) -> dict[str, Tensor]:
    """Mean of a loss per band of timesteps: the whole is nearly flat, its bands are not.

    Args:
        values: Loss per sample, (B,).
        timestep: (B,), below `timesteps`.

    Returns:
        `mse_t0` (least noise) to `mse_t{bands-1}`; NaN for a band without a sample.
    """
    band = timestep * bands // timesteps
    return {
        f"mse_t{index}": torch.where(band == index, values.detach(), torch.nan).nanmean()
        for index in range(bands)
    }


def kind_loss(
    logits: Tensor, batch: Mapping[str, Tensor], classification: Classification, mild: float = 0.0
) -> Tensor:
    """Classification loss, (): sum of w CE / sum of w, where w tells how visible the kinds are.

    Args:
        logits: (P, N).
        batch: `label` (P,), `kinds` (P, N) and `severities` (P, N), see `RestorationBatches`.
        classification: One kind per photo, the strongest, or each kind by itself.
        mild: Below this severity a kind counts in proportion: nobody can tell it from none, and it
            would teach to name clean photos anything. 0 counts all alike. What is not there
            (`clean` but for clean photos, too) counts as much as the photo's most visible kind.
    """
    present, severities = batch["kinds"] > 0, batch["severities"]
    visible = severities / mild if mild else torch.ones_like(severities)
    # Clean photos have no severity and pairs an unknown one: both count in full.
    visible = torch.where(severities > 0, visible, 1.0).clamp(max=1) * present
    strongest = visible.amax(dim=1, keepdim=True)
    if classification == "bce":
        terms = F.binary_cross_entropy_with_logits(logits, batch["kinds"], reduction="none")
        weight = torch.where(present, visible, strongest)
    else:
        terms = F.cross_entropy(logits, batch["label"], reduction="none")[:, None]
        weight = strongest
    return (weight * terms).sum() / weight.sum()


def kind_scores(logits: Tensor, kinds: Tensor, classification: Classification) -> dict[str, Tensor]:
    """How often a classifier is right.

    Args:
        logits: (P, N).
        kinds: (P, N), 1 for each kind in the photo.
        classification: As in `kind_loss`.

    Returns:
        `accuracy`: share of photos whose first-named kind is in them; with `bce` also `exact`,
        share of photos of which every kind is told right.
    """
    first = logits.argmax(dim=1, keepdim=True)
    scores = {"accuracy": kinds.gather(1, first).mean()}
    if classification == "bce":
        scores["exact"] = ((logits > 0) == (kinds > 0)).all(dim=1).float().mean()
    return scores


def psnr_loss(image: Tensor, reference: Tensor, floor: float = 1e-4) -> Tensor:
    """Mean of minus the PSNR, in units of 100 dB so that gradients are about as large as L1's.

    Every photo counts by what it could gain in dB, and within a photo its large errors count most;
    L1 leaves a raindrop on a good photo nearly alone.

    Args:
        image: (B, 3, H, W) around [0, 1], not clamped, so that no pixel loses its gradient.
        reference: (B, 3, H, W) in [0, 1].
        floor: Added to the mean squared error: beyond it (1e-4: 40 dB) nothing is to be gained.

    Source: PSNR loss of HINet (arXiv 2105.06086); the floor is ours.
    """
    error = F.mse_loss(image, reference, reduction="none").flatten(1).mean(dim=1)
    return (error + floor).log10().mean() / 10


def spectral_distance(image: Tensor, reference: Tensor, window: int = 16) -> Tensor:
    """Mean L1 between the amplitudes of local spectra: texture where L1 would rather blur.

    Args:
        image: (B, 3, H, W) in [0, 1], sides of at least `window`.
        reference: Likewise.
        window: Side of the half-overlapping windows, pixels.

    Source: as the frequency loss of MIMO-UNet (arXiv 2108.05054), but of amplitudes and in windows,
    so that texture counts and its exact place does not.
    """

    def spectra(picture: Tensor) -> Tensor:
        step = window // 2
        pieces = picture.float().unfold(2, window, step).unfold(3, window, step)
        # The floor keeps the gradient of the amplitude finite where a frequency is absent.
        spectrum = torch.fft.rfft2(pieces, norm="ortho")
        return (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()

    return F.l1_loss(spectra(image), spectra(reference))


class Perceptual(nn.Module):
    """LPIPS where the weights of its backbone are on this machine, else `spectral_distance`."""

    def __init__(self, weights: Path | None = None) -> None:
        """Look for the weights; which distance runs is logged.

        Args:
            weights: torchvision's VGG16 state dict; None looks into the torch hub cache.

        Raises:
            FileNotFoundError: `weights` is given and does not exist.
            ValueError: It holds something else.
        """
        super().__init__()
        cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
        if weights is not None and not weights.is_file():
            raise FileNotFoundError(f"--lpips-weights: {weights} does not exist")
        file = weights or (cached if cached.is_file() else None)
        self.lpips: Any = _open_lpips(file) if file else None
        if file:
            log.info("perceptual loss: LPIPS (VGG16 of %s)", file)
        else:
            log.warning(
                "perceptual loss: the L1 distance of local spectra, because LPIPS's backbone is "
                "not there; put torchvision's %s into %s, or name it with --lpips-weights",
                *(VGG_FILE, cached.parent),
            )

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Mean distance of images (B, 3, H, W) in [0, 1], in fp32."""
        with torch.autocast(image.device.type, enabled=False):
            if self.lpips is None:
                return spectral_distance(image, reference)
            return self.lpips(image.float(), reference.float(), normalize=True).mean()


def _open_lpips(weights: Path) -> Any:
    """LPIPS with its heads, which the package brings, on a local backbone."""
    import lpips  # only here: without weights it is not needed

    accepted = f"accepted is torchvision's VGG16 ({VGG_FILE})"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip and torch alike, whatever the file is
        raise ValueError(f"{weights}: cannot be read ({error!r}); {accepted}") from error
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    own: Any = model.net.state_dict()  # sliceK.N.weight for torchvision's features.N.weight
    named = {key: f"features.{key.partition('.')[2]}" for key in own}
    if missing := [name for name in named.values() if name not in state]:
        raise ValueError(f"{weights}: lacks {missing[:3]}; {accepted}")
    model.net.load_state_dict({key: state[name] for key, name in named.items()})
    return model.eval().requires_grad_(False)


class PatchDiscriminator(nn.Sequential):
    """Says for each patch of about 70 pixels whether it comes from a photo (high) or not.

    Source: pix2pix (arXiv 1611.07004), three layers as in VQGAN; group norm in place of batch norm,
    because stage 2 trains on batches of four.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        def conv(channels_in: int, channels_out: int, stride: int) -> nn.Module:
            return nn.Conv2d(channels_in, channels_out, 4, stride, padding=1)

        steps: list[nn.Module] = [conv(3, width, 2), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            before, after = (width * 2 ** min(n, 3) for n in (layer - 1, layer))
            stride = 2 if layer < layers else 1
            steps += [conv(before, after, stride), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        super().__init__(*steps, conv(width * 2 ** min(layers, 3), 1, 1))


def hinge_discriminator(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator; gradients reach it alone.

    Args:
        real: Clean photos, (B, 3, H, W) in [-1, 1].
        fake: Decoded ones, likewise.
    """
    scores_real, scores_fake = discriminator(torch.cat([real, fake.detach()])).float().chunk(2)
    return 0.5 * (F.relu(1 - scores_real).mean() + F.relu(1 + scores_fake).mean())


def adversarial(discriminator: nn.Module, fake: Tensor) -> Tensor:
    """The generator's hinge term; gradients reach `fake` alone, not the discriminator."""
    parameters = {name: value.detach() for name, value in discriminator.named_parameters()}
    return -torch.func.functional_call(discriminator, parameters, (fake,)).float().mean()


def adaptive_weight(reconstruction: Tensor, adversary: Tensor, image: Tensor) -> Tensor:
    """Ratio of the two losses' gradients, at most 1, so that neither drowns the other.

    Taken at the decoded image, one conv after the weight that VQGAN (arXiv 2012.09841, eq. 7) takes
    it at: the decoder is not walked through twice for it.
    """
    wanted, rivalling = (
        torch.autograd.grad(loss, image, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversary)
    )
    return (wanted / (rivalling + 1e-8)).clamp(max=1.0).detach()
