"""A small byte-level tokenizer with a chat template, trained on the spot, and applications over scripted sources."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scripted_source import Reply, ScriptedSource, model_spec
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from spotserve.core.request import Request
from spotserve.gateway.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'function' %}{{ raise_exception('no functions') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. STOP and stop, then END of the story.\n\nUser: hello world, how are you?",
    "Привет, мир. Καλημέρα κόσμε. 你好，世界。こんにちは 🙂🚀 naïve café",
    "one two three four five six seven eight nine ten 0123456789 ### --- ``` {} [] ()",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def eos_id(tokenizer: Tokenizer) -> int:
    return tokenizer.encode("<|end|>", add_special_tokens=False)[0]


@pytest.fixture
def says(tokenizer: Tokenizer, eos_id: int) -> Callable[..., Reply]:
    """A reply of a text and the end-of-text token."""

    def reply(text: str, **options: object) -> Reply:
        return Reply((*tokenizer.encode(text, add_special_tokens=False), eos_id), **options)

    return reply


@pytest.fixture
def source_of(tokenizer: Tokenizer) -> Iterator[Callable[..., ScriptedSource]]:
    """A source that answers every request with one reply, or with `respond(request)`. Its attachments must balance in the end."""
    built: list[ScriptedSource] = []

    def build(reply: Reply | Callable[[Request], Reply], **options: object) -> ScriptedSource:
        respond = (lambda _request: reply) if isinstance(reply, Reply) else reply
        built.append(ScriptedSource(respond, model_spec(tokenizer.vocabulary_size), **options))
        return built[-1]

    yield build
    for source in built:
        assert sorted(source.attached) == sorted(source.detached + source.released)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
