"""gcompute certify: a quick certificate in this process, its page, and what it says to a wrong request."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Command

from gcompute.certify.strategies import STRATEGIES
from gcompute.cli import certificate_page
from gcompute.cli.main import main


@pytest.fixture(scope="module")
def certificate(environment, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The quick certificate as JSON, and its page."""
    page = tmp_path_factory.mktemp("certificate") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *args, **_: printed.extend(map(str, args)))
        with pytest.raises(SystemExit) as ended:
            main(["certify", "--quick", "--json", "--html", str(page)])
    result = json.loads(printed[-1])
    assert ended.value.code == 0, [row["reasons"] for row in result["rows"] if row["reasons"]]
    return result, page.read_text(encoding="utf-8")


def test_a_strategy_alone_is_green_and_has_a_page(gcompute: Command, tmp_path: Path):
    ended = gcompute("certify", "--quick", "--strategy", "vocabulary", "--json", "--html", tmp_path / "page.html")
    assert ended.status == 0, ended.err
    rows = json.loads(ended.out.splitlines()[-1])["rows"]
    assert {row["verdict"] for row in rows} == {"equal"}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(row["name"] in page for row in rows)


@pytest.mark.oldest
@pytest.mark.slow
def test_the_quick_certificate_is_green(certificate):
    result, _ = certificate
    assert result["counts"]["differs"] == 0
    assert result["counts"]["equal"] + result["counts"]["refused"] == len(result["rows"])
    assert result["counts"]["refused"] >= 10
    covered = {strategy for row in result["rows"] if row["verdict"] == "equal" for strategy in row["strategies"]}
    assert covered >= set(STRATEGIES)


@pytest.mark.slow
def test_a_row_holds_numbers_collectives_and_one_compilation(certificate):
    rows = {row["name"]: row for row in certificate[0]["rows"]}
    product = rows["data=2,fsdp=2,tensor=2"]
    assert product["compilations"] == 1
    quantities = {check["quantity"]: check for check in product["checks"]}
    assert set(quantities) >= {"loss", "gradients", "parameters after 1 step", "parameters after all steps"}
    assert "blocks/attention/q_DNH" in quantities["gradients"]["leaves"]
    assert all(check["error"] <= check["limit"] for check in product["checks"])
    assert product["collectives"]["cpu"]["fsdp"]["all-gather"] > 0
    assert rows["tensor.row_parallel"]["checks"][0]["error"] == 0.0
    refused = [row for row in rows.values() if row["refusal"]]
    assert all(row["verdict"] == "refused" for row in refused)


@pytest.mark.slow
def test_the_page_is_whole_by_itself(certificate):
    result, page = certificate
    assert "http" not in page
    assert "<script" not in page
    for row in result["rows"]:
        assert row["name"] in page
    assert page.count('class="equal"') == result["counts"]["equal"]
    assert certificate_page.summary(result) in page


@pytest.mark.slow
def test_a_red_row_is_told_in_words(certificate):
    result, _ = certificate
    red = json.loads(json.dumps(result))
    red["rows"][0].update(verdict="differs", reasons=["loss in float64 is off by 1.0e-03 <b>"])
    red["counts"].update(differs=1)
    page = certificate_page.render(red)
    assert "off by 1.0e-03 &lt;b&gt;" in page
    assert "1 DIFFER" in page


@pytest.mark.slow
def test_the_tables_fit_a_page(certificate, capsys):
    from gcompute.cli.certify import _show

    _show(certificate[0])
    out = capsys.readouterr().out
    assert "data=2,fsdp=2,tensor=2" in out
    assert "0 (bits)" in out
    assert "none differs" in out
    assert max(map(len, out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--strategy", "tensr"), "strategy 'tensr' is not known. Did you mean 'tensor'?"),
        (("--strategy", "pipeline"), "strategy 'pipeline' is not known. Legal: data, stage,"),
        (("--on", "v5e:3x5"), "v5e:3x5 is not a slice that exists."),
        (("--devices", "0"), "Invalid value for '--devices'"),
        (("--devices", "1", "--strategy", "vocabulary", "--quick"), "devices=1 hold no row"),
        (("--html", "no/such/place.html"), "there is no directory"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, said, gcompute: Command):
    assert said in gcompute("certify", *arguments).error


def test_too_few_devices_in_this_process_is_one_line(gcompute: Command, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "devices", lambda *_: [object()] * 2)
    error = gcompute("certify", "--strategy", "vocabulary", "--quick").error
    assert "need 4 devices and there are 2" in error


@pytest.mark.slow
@pytest.mark.lasts(13)
def test_the_whole_certificate_is_green(tmp_path: Path):
    command = [sys.executable, "-m", "gcompute", "certify", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    result = json.loads(ended.stdout)
    assert [row["name"] for row in result["rows"] if row["verdict"] == "differs"] == []
    assert ended.returncode == 0


@pytest.mark.slow
def test_on_a_tpu_topology_the_collectives_are_those_expected(tmp_path: Path):
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "gcompute", "certify", "--quick", "--json", "--on", "v5e:2x4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    result = json.loads(ended.stdout)
    assert ended.returncode == 0, [row["reasons"] for row in result["rows"] if row["reasons"]]
    equal = [row for row in result["rows"] if row["verdict"] == "equal"]
    assert all(set(row["collectives"]) == {"cpu", "v5e:2x4"} for row in equal)


@pytest.mark.oldest
def test_the_proof_of_serving_is_told_in_tables(capsys):
    from gcompute.cli.certify_serving import show

    counts = {
        "requests": 9,
        "tokens": 90,
        "equal": 88,
        "within_bound": 1,
        "unstable": 0,
        "violations": 1,
        "logprobs": 4,
    }
    one = {"request": 3, "position": 2, "token": None, "expected": 7, "gap": "inf", "bound": 1e-4, "unstable": False}
    other = {**one, "request": 4, "token": 5, "gap": 2e-5, "within": True}
    proof = {
        **counts,
        "model": "Llama form",
        "logit_bound": 7e-6,
        "logprob_error_over_bound": {"median": 0.0, "p99": 0.1, "largest": 0.2},
        "differences": [{**one, "within": False}, other],
        "faults": [],
        "ways": [{"way": "alone", "compared": 9, "bitwise_equal": 9, "differing": {}, "faults": []}],
        "cost": {"deterministic_tokens_per_s": 80.0, "default_tokens_per_s": 100.0, "speed_ratio": 0.8, "rounds": 3},
    }
    versions = {"jax": "0", "jaxlib": "0"}
    result = {"mode": "default", "precision": "float32", "versions": versions, "violations": 1, "seconds": 2.0}
    show({**result, "proofs": [proof]})
    out = capsys.readouterr().out
    assert "request 3, output 2: an end for 7, gap inf of 1.0e-04  VIOLATION" in out
    assert "request 4, output 2: 5 for 7, gap 2.0e-05 of 1.0e-04\n" in out
    assert "9 requests, 1 VIOLATIONS; 1 tokens differ by less than rounding may do." in out
    assert "80 tokens/s in the deterministic mode, 100 in the default: 0.80 of its speed." in out


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("servin",), "certify 'servin' is not known. Did you mean 'serving'?"),
        (("--quick", "serving"), "serving takes its own options"),
        (("serving", "--requests", "2"), "Invalid value for '--requests'"),
        (("serving", "no/such/run"), "does not exist"),
    ],
)
def test_a_wrong_request_for_the_proof_of_serving_is_one_line(arguments, said, gcompute: Command):
    assert said in gcompute("certify", *arguments).error


@pytest.mark.slow
def test_the_proof_of_serving_is_green_and_counts_a_thousand_requests():
    command = [sys.executable, "-m", "gcompute", "certify", "serving", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    result = json.loads(ended.stdout)
    assert (ended.returncode, result["violations"]) == (0, 0), [proof["faults"] for proof in result["proofs"]]
    assert sum(proof["requests"] for proof in result["proofs"]) == 1000
