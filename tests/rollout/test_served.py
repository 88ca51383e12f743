"""A model behind a server: what is asked and taken, by a stand-in for vLLM's and by a real `transformers serve`."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from support import TinyPolicy, serving

from lightning_rlvr.rollout import Served, ServedEngine, TransformersEngine
from lightning_rlvr.types import Sampling, UserError

PROMPTS = ["4=", "12+3=", "x y"]
EOS = TinyPolicy().tokenizer().eos_token_id


@pytest.fixture
def vllm():
    """Start a server that answers as vLLM does: three tokens drawn by the seed, then the end."""
    asked, troubles = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "key": self.headers["Authorization"]})
            status, said = troubles.pop() if troubles else (200, answer(body))
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, troubles
    server.shutdown()
    server.server_close()


def answer(body):
    drawn = torch.randint(10, 60, (3,), generator=torch.Generator().manual_seed(body["seed"])).tolist()
    ids = [*drawn, EOS][: body["max_tokens"]]
    logprobs = {"token_logprobs": [-0.5] * len(ids), "tokens": [""] * len(ids), "top_logprobs": None, "text_offset": []}
    choice = {"index": 0, "text": "...", "token_ids": ids, "logprobs": logprobs}
    choice["finish_reason"] = "stop" if ids[-1] == EOS else "length"
    return {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def engine(url, **settings):
    return ServedEngine(Served(url, "the-model", **settings), TinyPolicy().tokenizer())


def encoded():
    return [list(TinyPolicy().tokenizer()(text)["input_ids"]) for text in PROMPTS]


def test_what_is_asked_and_taken(vllm, monkeypatch):
    url, asked, _ = vllm
    monkeypatch.setenv("OPENAI_API_KEY", "for another server")
    prompts = encoded()
    rollouts = engine(url, parallel=3).generate(prompts, [1, 2, 3], 2, Sampling(max_new_tokens=8))
    assert rollouts.mask.sum(1).tolist() == [4] * 6
    assert not rollouts.truncated.any()
    assert (rollouts.logp == -0.5).all()
    assert rollouts.entropy.isnan().all()  # no server tells it
    assert rollouts.prompt_ids[2, -len(prompts[1]) :].tolist() == prompts[1]
    first = {tuple(body["prompt"]): [] for body in asked}
    for body in asked:
        first[tuple(body["prompt"])].append(answer(body)["choices"][0]["token_ids"])
        settings = (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"])
        assert settings == (1.0, 1.0, 0, 0.0, 1.0)  # its defaults may be a model's own
        assert (body["model"], body["max_tokens"], body["logprobs"]) == ("the-model", 8, 0)
    for i, prompt in enumerate(prompts):
        assert sorted(rollouts.response_ids[2 * i : 2 * i + 2].tolist()) == sorted(first[tuple(prompt)])
    assert len({body["seed"] for body in asked}) == 6
    assert {body["key"] for body in asked} == {"Bearer none"}
    again = engine(url).generate(prompts, [1, 2, 3], 2, Sampling(max_new_tokens=8))
    assert torch.equal(again.response_ids, rollouts.response_ids)


@pytest.mark.parametrize(
    ("sampling", "logp"),
    [
        (Sampling(max_new_tokens=2), -0.5),
        (Sampling(max_new_tokens=2, temperature=0.0), 0.0),  # a point mass
        (Sampling(max_new_tokens=2, temperature=0.5), torch.nan),  # told of the model, not of what was drawn from
        (Sampling(max_new_tokens=2, top_p=0.9), torch.nan),
    ],
)
def test_log_probabilities_are_those_of_the_sampling_or_nan(vllm, sampling, logp):
    rollouts = engine(vllm[0]).generate(encoded(), [1, 2, 3], 1, sampling)
    assert rollouts.truncated.all()
    torch.testing.assert_close(rollouts.logp, torch.full((3, 2), logp), equal_nan=True)
    assert rollouts.entropy.isnan().all() == (sampling.temperature > 0)


def test_a_moment_of_trouble_is_waited_out(vllm):
    url, asked, troubles = vllm
    troubles += [(503, {"error": "busy"}), (429, {"error": "too many"})]
    rollouts = engine(url, parallel=1).generate(encoded(), [1, 2, 3], 1, Sampling(max_new_tokens=8))
    assert len(asked) == 3 + 2
    assert rollouts.mask.sum() == 12


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ((404, {"error": {"message": "the model does not exist"}}), "does not exist.*Set url"),
        (
            (200, {**answer({"seed": 1, "max_tokens": 4, "model": ""}), "choices": [{"text": "x"}]}),
            "which tokens it drew",
        ),
    ],
)
def test_what_a_server_cannot_do_is_said(vllm, trouble, said):
    url, _, troubles = vllm
    troubles.append(trouble)
    with pytest.raises(UserError, match=said):
        engine(url).generate(encoded(), [1, 2, 3], 1, Sampling(max_new_tokens=4))


def test_a_prompt_that_text_cannot_say_is_refused():
    text = engine("http://127.0.0.1:9/v1", server="openai")
    with pytest.raises(UserError, match=r"same tokens.*set server .* to vllm"):
        text.generate([[EOS, 5, EOS + 500]], [1], 1, Sampling(max_new_tokens=4))


def test_the_settings_are_checked():
    with pytest.raises(UserError, match="parallel must be at least 1"):
        Served("http://127.0.0.1/v1", "m", parallel=0)
    with pytest.raises(UserError, match="Set tokenizer_name"):
        Served("http://127.0.0.1/v1", "m").tokenizer()


def test_a_key_is_sent_only_where_it_is_meant_to_be(vllm, monkeypatch):
    url, asked, _ = vllm
    with pytest.raises(UserError, match="THE_KEY is not set"):
        engine(url, key_variable="THE_KEY")
    monkeypatch.setenv("THE_KEY", "secret")
    engine(url, key_variable="THE_KEY").generate(encoded(), [1, 2, 3], 1, Sampling(max_new_tokens=4))
    assert {body["key"] for body in asked} == {"Bearer secret"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Start `transformers serve` on a policy; give its url, the folder of the policy and the policy."""
    folder = tmp_path_factory.mktemp("served")
    policy = TinyPolicy().load()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(15)  # else nearly uniform
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    with serving(folder) as url:
        yield url, str(folder), policy


def served_by(real, **settings):
    url, folder, _ = real
    served = Served(url, folder, folder, "transformers", **settings)
    return ServedEngine(served, served.tokenizer())


def test_a_real_server_and_our_engine_draw_the_same_greedy_tokens(real):
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    ours = TransformersEngine.of(real[2]).generate(encoded(), [1, 2, 3], 2, sampling)
    theirs = served_by(real).generate(encoded(), [1, 2, 3], 2, sampling)
    for name in ("prompt_ids", "prompt_mask", "response_ids", "mask", "logp", "entropy", "truncated"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name


def test_a_real_server_samples_from_the_models_own_distribution(real):
    policy, samples = real[2], 150
    rollouts = served_by(real, parallel=4).generate(encoded()[:1], [1], samples, Sampling(max_new_tokens=1))
    with torch.no_grad():
        logp = policy.model(torch.tensor(encoded()[:1])).logits[0, -1].log_softmax(-1)
    drawn = logp[rollouts.response_ids[:, 0]]
    mean, deviation = (logp.exp() * logp).sum(), ((logp.exp() * logp**2).sum() - (logp.exp() * logp).sum() ** 2).sqrt()
    assert abs(drawn.mean() - mean) < 4 * deviation / samples**0.5
    assert (drawn < logp.sort().values[-51]).any()  # beyond a default of top_k 50
