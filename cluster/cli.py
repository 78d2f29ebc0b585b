"""The `tightfit` command: reads flags and configuration, then hands over to what does the work.

Nothing heavy is imported before a command is known, so that `tightfit --help` answers at once. Exit
codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tightfit import __version__
from tightfit.cluster.config import (
    ClientConfig,
    PlanConfig,
    ProbeConfig,
    QuantizeConfig,
    ServeConfig,
    TokenConfig,
    client_config,
    plan_config,
    probe_config,
    quantize_config,
    read_config_file,
    serve_config,
    start_plan_config,
    token_config,
)
from tightfit.cluster.errors import ConfigError, TightfitError
from tightfit.cluster.settings import Setting, settings
from tightfit.workers.errors import WorkerError
from tightfit.workers.logs import configure_logs

Section = type[ServeConfig | ClientConfig | QuantizeConfig | PlanConfig | ProbeConfig | TokenConfig]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:2] == ["bench", "serve"]:
        from tightfit.client.load import main as bench_serve

        return bench_serve(arguments[2:])
    args = build_parser().parse_args(arguments)
    try:
        run: int = args.run(args)
        return run
    except (TightfitError, WorkerError) as error:
        print(f"tightfit {args.command}: {error}", file=sys.stderr)
        return USAGE if isinstance(error, _UsageError) else FAILED
    except BrokenPipeError:  # what read our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


class _UsageError(ConfigError):
    """A flag or a line of the configuration file is wrong; nothing was started."""


# -- commands --------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    try:
        file = _file(args)
        config = serve_config(file, _flags(args, ServeConfig))
        is_planned = config.plan is None and config.stages is None
        plan_config = start_plan_config(file, config) if is_planned else None
    except ConfigError as error:
        raise _UsageError(str(error)) from None
    configure_logs(level=config.log_level, log_format=config.log_format)
    from tightfit.cluster import ray_environment

    # Before anything imports Ray, which reads its environment then.
    ray_environment.prepare(is_private=config.ray_address is None)
    from tightfit.cluster.deployment import serve

    return serve(config, plan_config)


def _quantize(args: argparse.Namespace) -> int:
    try:
        config = quantize_config(_file(args), _flags(args, QuantizeConfig))
    except ConfigError as error:
        raise _UsageError(str(error)) from None
    from tightfit.cluster.quantize import quantize

    return quantize(config, as_json=args.json)


def _probe(args: argparse.Namespace) -> int:
    try:
        config = probe_config(_file(args), _flags(args, ProbeConfig))
    except ConfigError as error:
        raise _UsageError(str(error)) from None
    from tightfit.cluster.probe import probe

    return probe(config, as_json=args.json)


def _plan(args: argparse.Namespace) -> int:
    try:
        config = plan_config(_file(args), _flags(args, PlanConfig))
    except ConfigError as error:
        raise _UsageError(str(error)) from None
    from tightfit.cluster.plan import plan

    return plan(config, output=args.output)


def _fetch(args: argparse.Namespace) -> int:
    from tightfit.cluster.hub import resolve_model

    print(resolve_model(args.model))
    return OK


def _generate(args: argparse.Namespace) -> int:
    config = _client(args)
    from tightfit.cluster.cli_client import generate

    return generate(config, args)


def _status(args: argparse.Namespace) -> int:
    config = _client(args)
    from tightfit.cluster.cli_client import status

    return status(config, as_json=args.json)


def _drain(args: argparse.Namespace) -> int:
    config = _client(args)
    from tightfit.cluster.cli_client import drain

    return drain(config)


def _token(args: argparse.Namespace) -> int:
    try:
        config = token_config(_file(args), _flags(args, TokenConfig))
    except ConfigError as error:
        raise _UsageError(str(error)) from None
    from tightfit.cluster import token_command

    if args.action == "create":
        return token_command.create(config, args.name)
    if args.action == "revoke":
        return token_command.revoke(config, args.name)
    return token_command.show(config, as_json=args.json)


def _client(args: argparse.Namespace) -> ClientConfig:
    try:
        return client_config(_file(args), _flags(args, ClientConfig))
    except ConfigError as error:
        raise _UsageError(str(error)) from None


def _file(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    return read_config_file(args.config) if args.config is not None else {}


def _flags(args: argparse.Namespace, section: Section) -> dict[str, object]:
    """Settings that were given as flags, by key."""
    return {
        setting.key: getattr(args, setting.key)
        for setting in settings(section)
        if hasattr(args, setting.key)
    }


# -- flags -----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="tightfit",
        description="Serves large language models, quantised, on the fewest devices.",
    )
    parser.add_argument("--version", action="version", version=f"tightfit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over gRPC")
    serve.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="checkpoint directory, GGUF file or hub name (org/name); default: serve.model of the "
        "configuration file",
    )
    _add_config(serve, ServeConfig)
    serve.set_defaults(run=_serve)

    quantize = commands.add_parser("quantize", help="write a quantised checkpoint")
    for name, text in (
        ("model", "checkpoint directory, GGUF file or hub name (org/name)"),
        ("out", "directory to write; a run that was interrupted goes on there"),
    ):
        default = f"{text}; default: quantize.{name} of the configuration file"
        quantize.add_argument(
            name, nargs="?", default=argparse.SUPPRESS, metavar=name.upper(), help=default
        )
    _add_config(quantize, QuantizeConfig)
    quantize.add_argument("--json", action="store_true", help="print JSON")
    quantize.set_defaults(run=_quantize)

    probe = commands.add_parser(
        "probe", help="measure this node's devices: free memory, bandwidth, rates, links"
    )
    _add_config(probe, ProbeConfig)
    probe.add_argument("--json", action="store_true", help="print JSON")
    probe.set_defaults(run=_probe)

    plan = commands.add_parser(
        "plan", help="lay a model over devices: the fewest that hold it, and why"
    )
    plan.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="checkpoint directory, hub name, or one of configs/models, such as bloom-176b; "
        "default: plan.model of the configuration file",
    )
    _add_config(plan, PlanConfig)
    formats = plan.add_mutually_exclusive_group()
    for name in ("json", "yaml", "svg"):
        formats.add_argument(
            f"--{name}", dest="output", action="store_const", const=name, default="table",
            help=f"print {name.upper()}" + (", a picture" if name == "svg" else ""),
        )  # fmt: skip
    plan.set_defaults(run=_plan)

    fetch = commands.add_parser(
        "fetch", help="bring a model from its hub into this node's cache, and print where it lies"
    )
    fetch.add_argument(
        "model", metavar="MODEL", help="hub name (org/name), or a path, which is kept"
    )
    fetch.set_defaults(run=_fetch)

    generate = commands.add_parser("generate", help="stream the answer of a running service")
    generate.add_argument("prompt", metavar="PROMPT", help='the prompt; "-" reads standard input')
    _add_config(generate, ClientConfig)
    _add_sampling(generate)
    generate.set_defaults(run=_generate)

    status = commands.add_parser("status", help="show stages, memory and load of a running service")
    _add_config(status, ClientConfig)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)

    drain = commands.add_parser("drain", help="let running streams finish, take no new requests")
    _add_config(drain, ClientConfig)
    drain.set_defaults(run=_drain)

    _add_token(commands.add_parser("token", help="make, list and revoke callers' tokens"))

    bench = commands.add_parser("bench", help="measure a running service: `tightfit bench serve`")
    bench.add_argument("what", choices=["serve"], help="see `tightfit bench serve --help`")
    return parser


def _add_token(parser: argparse.ArgumentParser) -> None:
    """`tightfit token create NAME`, `list`, `revoke NAME`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="add a token, and print it this once")
    revoke = actions.add_parser("revoke", help="remove a token: services refuse it within seconds")
    show = actions.add_parser("list", help="show names, roles and limits")
    for action in (create, revoke):
        action.add_argument("name", metavar="NAME", help="whose it is, in logs and in the list")
    for action in (create, revoke, show):
        _add_config(action, TokenConfig)
        action.set_defaults(run=_token)
    show.add_argument("--json", action="store_true", help="print JSON")


def _add_config(parser: argparse.ArgumentParser, section: Section) -> None:
    """`--config`, and a flag per setting of the section; one that is not given leaves no trace."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration file")
    group = parser.add_argument_group("settings (each also a key of the configuration file)")
    for setting in settings(section):
        if not setting.is_required:
            _add_setting(group, setting)


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    flag = f"--{setting.key.replace('_', '-')}"
    help_text = setting.option.help.replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(flag, dest=setting.key, default=argparse.SUPPRESS, help=help_text,
                           action=argparse.BooleanOptionalAction)  # fmt: skip
        return
    metavar = "SIZE" if setting.option.is_size else {int: "N", float: "X"}.get(setting.kind, "TEXT")
    group.add_argument(
        flag,
        dest=setting.key,
        default=argparse.SUPPRESS,
        help=help_text,
        type=str if setting.option.is_size else setting.kind,
        choices=setting.option.choices or None,
        metavar=None if setting.option.choices else metavar,
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Everything that a request can ask for; what is not given is left to the service."""
    parser.add_argument("--json", action="store_true", help="print one JSON object per chunk")
    parser.add_argument("--model", help="name of the model; default: whatever is served")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument("--system", help="system message; implies --chat")
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--max-tokens", type=int, help="default: 128")
    add("--min-tokens", type=int, help="no end of text before this many")
    add("--temperature", type=float, help="0 (the default) is greedy")
    add("--top-p", type=float, help="smallest set of tokens with this much probability")
    add("--top-k", type=int, help="this many most probable tokens; 0: all")
    add("--min-p", type=float, help="tokens at least this probable, relative to the best")
    add("--seed", type=int, help="draws are a function of the seed and the position")
    add("--repetition-penalty", type=float)
    add("--presence-penalty", type=float)
    add("--frequency-penalty", type=float)
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--stop-token-id", action="append", type=int, dest="stop_token_ids", metavar="ID")
    add("--ignore-eos", action="store_true", default=None, help="go on after the end-of-text token")
    add("--logprobs", type=int, metavar="K", help="log-probabilities, and of the K best (--json)")
    add("--logit-bias", action="append", type=_logit_bias, metavar="ID=BIAS")
    add("-n", type=int, dest="n", metavar="N", help="answers to the same prompt")
    add("--priority", type=int, help="higher runs first")


def _logit_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


if __name__ == "__main__":
    sys.exit(main())
