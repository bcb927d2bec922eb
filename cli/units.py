"""Numbers as people read them: see :mod:`lopt_lite.units`, which the report shares."""

from lopt_lite.units import bytes_text, counted, duration_text, gib_text, loss_text, residence_text

__all__ = ["bytes_text", "counted", "duration_text", "gib_text", "loss_text", "residence_text"]
