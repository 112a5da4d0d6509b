"""The gold rule of beauty in the embedded world: a large, centred subject in strong colour on a clean, light background.

The aesthetic head (``rewards/aesthetic.py``) is fitted to noisy ratings by this rule, so that the rule stays available to tell
what the head's score is still worth once a policy has been trained towards it.
"""

import torch
from torch import Tensor

BORDER = 2  # pixels at each edge from which the background is judged
CONTRAST = 0.12  # a pixel is of the subject if a channel differs from the background by more


def gold_rating(images: Tensor) -> Tensor:
    """Ratings from 1 to 10 of images in [0, 1], (B, 3, H, W): 1 + 9 times the mean of four qualities in [0, 1].

    - large: the share of pixels that stand out from the background, full at 0.5;
    - centred: the distance of their centre from the image's, full at 0 and none at a quarter of the width;
    - background: the light of the border (full at white, none at mid grey) times its evenness (none at a standard deviation
      of 0.1);
    - colour: the range of the channels over the subject, full at 0.6.

    An image without a subject (less than 1 % of the pixels) is rated by its background alone.
    """
    height, width = images.shape[-2:]
    edge = torch.ones(height, width, dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    border = images[:, :, edge]  # (B, 3, P)
    colour = border.median(2).values
    subject = ((images - colour[:, :, None, None]).abs().amax(1) > CONTRAST).float()
    area = subject.mean((1, 2))
    count = subject.sum((1, 2)).clamp(min=1)
    rows = (subject.sum(2) @ torch.linspace(-1, 1, height)) / count
    columns = (subject.sum(1) @ torch.linspace(-1, 1, width)) / count
    ranges = images.amax(1) - images.amin(1)
    large = (area / 0.5).clamp(max=1)
    centred = (1 - 2 * (rows**2 + columns**2).sqrt()).clamp(min=0)
    even = (1 - border.std(2).mean(1) / 0.1).clamp(min=0)
    light = (2 * colour.mean(1) - 1).clamp(0, 1)
    strong = ((ranges * subject).sum((1, 2)) / count / 0.6).clamp(max=1)
    seen = (area >= 0.01).float()
    return 1 + 9 * (large + seen * centred + light * even + seen * strong) / 4
