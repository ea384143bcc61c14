"""What the scenes of the demo model stand on: pictures of Debian packages and of scikit-image. Data only."""

from __future__ import annotations

BACKGROUNDS = ("brick.png", "grass.png", "gravel.png", "moon.png", "hubble_deep_field.jpg")
"""Photographs of scikit-image that show none of the classes: training backgrounds."""
DESKTOPS = (
    "nature/Aqua.jpg", "nature/Blinds.jpg", "nature/Dune.jpg", "nature/GreenMeadow.jpg",
    "nature/Storm.jpg", "nature/Wood.jpg", "desktop/Ubuntu-Mate-Warm-no-logo.png",
)  # fmt: skip
"""Pictures of mate-backgrounds (Debian) that show none of the classes: training backgrounds."""
UNSEEN_DESKTOPS = (
    "nature/RainDrops.jpg", "desktop/Stripes.png", "desktop/Ubuntu-Mate-Cold-no-logo.png",
)  # fmt: skip
"""Pictures of mate-backgrounds that training never sees."""
