"""Talk to a run's model in the terminal."""

from collections.abc import Iterator

from finetune.embedded import say
from finetune.errors import UserError
from finetune.run_folder import Run


def chat(run: Run) -> None:
    """Talk to the merged model in the terminal; Ctrl-C stops one answer, Ctrl-D ends."""
    from finetune import generation, serving
    from finetune import model as models
    from finetune.engine import ANSWER_TOKENS as ANSWERED_TOKENS
    from finetune.engine import fit

    folder = run.folder / "model"
    if not folder.is_dir():
        raise UserError(f"There is no model in {run.folder} yet: run '{run.command}' first.")
    models.check_folder(folder)
    form, (model, fast, runs_on) = models.chat_format(folder), serving.load(folder)
    room = serving.pool_tokens(model, 1)
    most = min(ANSWERED_TOKENS, room // 4)
    decoder = generation.Decoder(model, form.stop_ids, room, fast=fast)
    say(runs_on)
    say(f"{run.title} · Ctrl-C stops an answer, Ctrl-D ends · Ctrl-C 停止回答，Ctrl-D 结束")
    history: list[dict] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text:
            continue
        turn = {"role": "user", "content": text}
        try:
            kept = fit([*history, turn], lambda messages: len(form.prompt(messages)), room - most)
        except UserError as error:  # too long; what was said before is kept
            say(str(error))
            continue
        history.append(turn)
        answer = ""
        pieces: Iterator[str] = generation.stream(decoder, form, kept, most)
        try:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
        print()
        history.append({"role": "assistant", "content": answer})
