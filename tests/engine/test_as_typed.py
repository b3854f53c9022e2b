"""What people type first does what it looks like, or says at once what to write."""

import pytest
import tiny
from tokenizers import Tokenizer as Core
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import jaxkv
from jaxkv import LLM, KeepFraction, KVCompress, LeanKV, MaxBytes, MaxTokens, Policy, Ratio, SamplingParams
from models import Tokenizer

pytestmark = pytest.mark.once
TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if thinking %}w9 {% endif %}{% if tools %}w8 {% endif %}w7"
)


@pytest.fixture(scope="module")
def llm():
    core = Core(WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    return LLM(tiny.MODEL, tokenizer=Tokenizer(core=core, chat_template=TEMPLATE))


def test_budgets_are_numbers_or_objects():
    assert Ratio(8) == Ratio(ratio=8) == KVCompress(ratio=8).budget
    assert MaxTokens(64) == KVCompress(max_cache_tokens=64).budget
    assert MaxBytes(5000) == LeanKV(max_cache_bytes=5000).budget
    assert KeepFraction(0.5) == KeepFraction(fraction=0.5)
    assert KVCompress(ratio=8) == KVCompress(budget=Ratio(8))
    assert hash(KVCompress(ratio=8)) == hash(KVCompress(budget=Ratio(8)))
    assert repr(KVCompress(ratio=8)) == repr(KVCompress(budget=Ratio(8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVCompress(), r"KVCompress needs a budget: write ratio=8, or budget=Ratio\(8\)"),
        (lambda: KVCompress(budget=Ratio(8), ratio=4), "not both"),
        (
            lambda: KVCompress(ratio=8, max_cache_tokens=64),
            "give one of ratio, max_cache_tokens, .*, got 2",
        ),
        (lambda: KVCompress(ratio="8"), "ratio must be a number, got '8'"),
        (lambda: KVCompress(ratio=0.875), "a share of 0.875 removed is a ratio of 8"),
    ],
)
def test_what_is_no_budget_says_what_to_write(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_compression_may_be_named():
    named = LLM(tiny.MODEL, compression="snapkv", ratio=4, cache_memory="500K")
    assert named.compression == jaxkv.SnapKV(budget=Ratio(4))
    assert named.cache_memory == 500_000
    assert LLM(tiny.MODEL, compression="none").compression is None
    assert LLM(tiny.MODEL, ratio=4).compression == KVCompress(ratio=4)
    assert SamplingParams(compression="h2o", ratio=4).compression == jaxkv.H2O(ratio=4)
    assert SamplingParams(ratio=4).compression == KVCompress(ratio=4)
    assert SamplingParams().compression == "default"
    assert SamplingParams(compression="none").compression is None


def test_sampling_may_be_given_by_the_call(llm):
    [short] = llm.generate("w1 w2 w3", max_tokens=3)
    assert len(short.token_ids) == 3
    assert llm.generate([1, 2, 3], SamplingParams(seed=3), max_tokens=3)[0].token_ids == short.token_ids
    assert "".join(llm.stream("w1 w2 w3", max_tokens=3)) == short.text
    with pytest.raises(TypeError, match="generate takes no max_token; of SamplingParams it takes max_tokens,"):
        llm.generate("w1", max_token=3)


def test_a_chat_is_one_call(llm):
    messages = [{"role": "user", "content": "w1 w2"}]
    [answer] = llm.chat(messages, max_tokens=3)
    assert answer.prompt_tokens == 3
    assert answer.token_ids == llm.generate([1, 2, 7], max_tokens=3)[0].token_ids
    assert [a.token_ids for a in llm.chat([messages, messages], max_tokens=3)] == [answer.token_ids] * 2


def test_a_chat_template_has_options(llm):
    messages = [{"role": "user", "content": "w1"}]
    assert llm.chat_prompt(messages) == [1, 7]
    assert llm.chat_prompt(messages, thinking=True) == [1, 9, 7]
    assert llm.chat_prompt(messages, tools=[{"type": "function"}]) == [1, 8, 7]
    assert llm.chat(messages, thinking=True, max_tokens=1)[0].prompt_tokens == 3
    with pytest.raises(ValueError, match="knows no enable_thinking; it reads thinking, tools"):
        llm.chat_prompt(messages, enable_thinking=False)


@pytest.mark.parametrize("method", ["chat", "chat_prompt"])
def test_what_is_no_conversation_says_what_to_write(llm, method):
    with pytest.raises(ValueError, match=r"""write \[{"role": "user", "content": 'hi'}\]"""):
        getattr(llm, method)("hi")
    with pytest.raises(ValueError, match=r"write llm.chat\(messages\)"):
        llm.generate([{"role": "user", "content": "hi"}])


def test_every_policy_is_at_the_top():
    assert isinstance(jaxkv.__version__, str)
    for make in jaxkv.policies.POLICIES.values():
        if isinstance(make, type):
            assert issubclass(getattr(jaxkv, make.__name__), Policy)
