"""`datashapley demo`: what the command line says about the demo. The work is in `hf_datashapley.demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import HfArgumentParser

from ..demo.config import DemoConfig
from .config_files import add_common_options, parse


DESCRIPTION = """\
Which documents lowered the loss on code, and which that on prose?

Trains a small language model on the text that this Python installation holds (source code, reference prose, licences,
package READMEs) with some junk planted in it, and gives every document a value for each target: the part of the fall
of the target's loss, in nats per token, that training on the document brought about. Positive helped.
Nothing is downloaded. Every run writes a folder of its own below --output_dir."""

EPILOG = """\
examples:
  datashapley demo                                         about four minutes on two cores
  datashapley demo --updates 40                            a quick look
  datashapley demo --model llama-5m --updates 1000         another family, larger and longer
  datashapley demo --corpus my.parquet --targets wiki law  your documents (columns: text and, if you like, domain)
  datashapley demo --value_optimizer sgd                   the paper's values, which take AdamW for SGD"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        DemoConfig, prog="datashapley demo", description=DESCRIPTION, epilog=EPILOG, formatter_class=_HelpFormatter
    )
    add_common_options(parser)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parses and runs.

    Raises:
        SystemExit: `--help`, or an argument that argparse refuses.
        ValueError: a setting that cannot be met; the message names it and the cure.
    """
    settings = parse(parser(), DemoConfig, arguments)
    config = DemoConfig(**settings)

    # Here, so that `--help` does not load torch.
    import datasets
    from transformers.utils import logging

    from ..demo.job import demo

    # The demo has bars and words of its own; those of loading and saving would stand between them.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    demo(config)
