"""`tokenmill embed`: vectors of texts, one line of JSON each."""

import json
import sys
from argparse import ArgumentParser

from tokenmill.cli import arguments
from tokenmill.cli.loading import check_text, open_llm


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="texts; a single -: a text a line of standard input",
    )
    arguments.add_engine_arguments(parser)
    arguments.add_scheduling_arguments(parser)


def embed(*, texts: list[str], **values: object) -> None:
    """Print an object with the text, its vector and its number of tokens for each text."""
    config = arguments.make_engine_config(values)
    given = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    for number, text in enumerate(given):
        check_text(text, f"text {number}")
    with open_llm(config) as llm:
        for output in llm.embed(given):
            line = {
                "text": output.prompt,
                "embedding": output.outputs.embedding.tolist(),
                "num_tokens": len(output.prompt_token_ids),
            }
            print(json.dumps(line, ensure_ascii=False))
