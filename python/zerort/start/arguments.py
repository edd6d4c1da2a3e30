"""Command-line arguments as DeepSpeed's users know them."""

from __future__ import annotations

import argparse

__all__ = ["add_config_arguments"]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--deepspeed` and `--deepspeed_config FILE`; `initialize(args=...)` reads the latter.

    Mirrors deepspeed.add_config_arguments. `--deepspeed` switches nothing here and is accepted so
    that launch scripts go on working.
    """
    group = parser.add_argument_group("zerort", "configuration of the engine")
    group.add_argument(
        "--deepspeed",
        action="store_true",
        help="accepted for compatibility; the engine is always on",
    )
    group.add_argument(
        "--deepspeed_config", type=str, default=None, help="path to the JSON configuration"
    )
    return parser
