"""Loaded by the fork server: what Megatron says at import and on every build is not the tests' business."""

import logging
import warnings

logging.getLogger("megatron").setLevel(logging.ERROR)
warnings.simplefilter("ignore")
