"""Log lines as people and machines read them."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from tightfit.workers.logs import (
    JsonFormatter,
    TextFormatter,
    configure_logs,
    log_context,
    log_environment,
)


@pytest.fixture
def lines(request):
    """Everything that one logger said, in the format that the test asks for."""
    said = []
    formatter = request.param

    class Keep(logging.Handler):
        def emit(self, record):
            said.append(formatter.format(record))

    logger = logging.getLogger("tightfit.test_logs")
    handler = Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger, said
    logger.removeHandler(handler)


text = pytest.mark.parametrize("lines", [TextFormatter({"stage": 2})], indirect=True)
as_json = pytest.mark.parametrize("lines", [JsonFormatter({"stage": 2})], indirect=True)


@text
def test_a_text_line_has_time_level_logger_message_and_fields(lines):
    logger, said = lines
    logger.info("took %d s", 3, extra={"ttft_s": 0.25})
    time, level, rest = said[0].split(" ", 2)
    assert time.endswith("Z")
    assert "T" in time
    assert (level, rest) == ("INFO", "tightfit.test_logs: took 3 s stage=2 ttft_s=0.25")


@text
def test_what_comes_from_outside_cannot_forge_a_line_or_a_field(lines):
    logger, said = lines
    logger.warning("no model %s", "a\n2026 INFO tightfit: all is well", extra={"x": 'b" c=1\n'})
    assert len(said[0].splitlines()) == 1
    assert r"a\n2026" in said[0]
    assert r'x="b\" c=1\n"' in said[0]


@as_json
def test_a_json_line_is_one_object_with_the_same_fields(lines):
    logger, said = lines
    logger.error("a\nb", extra={"ttft_s": 0.25, "level": "spoofed"})
    assert len(said[0].splitlines()) == 1
    line = json.loads(said[0])
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "error", "logger": "tightfit.test_logs", "message": "a\nb", "stage": 2,
        "ttft_s": 0.25,
    }  # fmt: skip


@as_json
def test_a_traceback_stays_within_its_line(lines):
    logger, said = lines
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("incident")
    assert "ValueError: no" in json.loads(said[0])["traceback"]


@as_json
def test_a_tasks_context_is_in_its_lines_and_in_no_others(lines):
    logger, said = lines

    def work(request_id):
        log_context(request_id=request_id)
        barrier.wait()
        logger.info("line")

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.info("line")
    ids = [json.loads(line).get("request_id") for line in said]
    assert sorted(ids[:2]) == ["a", "b"]
    assert ids[2] is None


@pytest.fixture
def logging_as_before(monkeypatch):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in ("TIGHTFIT_LOG_LEVEL", "TIGHTFIT_LOG_FORMAT"):
        monkeypatch.setenv(name, "")
    yield
    root.handlers[:], root.level = handlers, level


def test_a_stages_process_logs_as_its_parent_does(logging_as_before):
    configure_logs(level="info", log_format="json")
    code = (
        "import logging; from tightfit.workers.logs import configure_logs_from_environment as c;"
        "c(stage=1); logging.getLogger('t').info('here'); logging.getLogger('t').debug('not')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **log_environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    line = json.loads(done.stderr)
    assert (line["message"], line["stage"], line["level"]) == ("here", 1, "info")


def test_what_a_record_factory_adds_for_itself_is_in_no_line():
    record = logging.makeLogRecord({"msg": "hello", "_ray_timestamp_ns": 5, "request_id": "r-1"})
    assert TextFormatter({}).format(record).endswith("hello request_id=r-1")
    assert "_ray_timestamp_ns" not in JsonFormatter({}).format(record)
