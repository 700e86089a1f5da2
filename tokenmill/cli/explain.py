"""`tokenmill explain`: the life of one operation, from the model's definition to machine code."""

from argparse import ArgumentParser

from tokenmill.cli.arguments import add_model_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--op", required=True, metavar="NAME", help="the operation, as in `linear`")
    add_model_argument(parser)


def explain(*, op: str, model: str) -> None:
    """Show one operation as model code, IR, after each pass, LLVM IR and assembly."""
    from tokenmill.backends.llvm.explain import explain_operation

    print(explain_operation(op, model=model))
