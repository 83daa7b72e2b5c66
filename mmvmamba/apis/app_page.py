"""The demo page: what stands where, and what happens when something is pressed. Needs gradio (extra ``app``).

The work behind it is in ``app.py`` and ``app_scans.py``; texts that come from outside are escaped in ``app_html.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mmvmamba.apis.app import TASKS, Answer, Models, Request, answer, demo_config, enlargement
from mmvmamba.apis.app_html import error_html, scan_html, status_html, table_html
from mmvmamba.apis.app_scans import KIND_NAMES, answer_layers, scan_view
from mmvmamba.apis.demo import STAGES
from mmvmamba.apis.failures import is_out_of_memory
from mmvmamba.datasets.samples import Sample
from mmvmamba.errors import MMVMambaError
from mmvmamba.optional import optional_package

TITLE = "mmvmamba: see what a model sees"
_WORDS = f"""# {TITLE}
Choose a picture and a model, and press **Run**. A click on the answer shows where the scans of the backbone look from
that pixel. Pictures stay on this machine."""
_QUEUE = "model"  # one thing at a time: a second one would only make both slower
_HEIGHT = 270  # of the answer, in pixels
T = TypeVar("T")


def build_page(models: Models, samples: Sequence[Sample]) -> Any:
    """Return the page, as ``gradio.Blocks``.

    Args:
        models: What answers.
        samples: Pictures to choose from.

    Raises:
        MissingPackage: If gradio is not installed.
    """
    gr = optional_package("gradio", "app")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_WORDS)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                asked = _inputs(gr, models, samples)
            with gr.Column(scale=7, min_width=300):
                shown = _outputs(gr, models)
        _connect_inputs(models, samples, asked)
        _connect_run(gr, models, asked, shown)
        _connect_scans(gr, models, shown)
    return page


def _inputs(gr: Any, models: Models, samples: Sequence[Sample]) -> dict[str, Any]:
    """Make the left half: what is asked."""
    task = models.first_task()
    model = str(demo_config(task))
    asked: dict[str, Any] = {
        "image": gr.Image(
            label="Picture",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,
            height=170,
            buttons=[],
            elem_id="picture",
            alt_text="The picture that was chosen",
        )
    }
    with gr.Row(elem_id="samples"):
        asked["samples"] = [
            gr.Button(sample.name, icon=sample.path, size="sm", min_width=60, elem_classes="sample")
            for sample in samples
        ]
    asked |= {
        "task": gr.Radio([(name, key) for key, name in TASKS.items()], value=task, label="Find", elem_id="task"),
        "model": gr.Dropdown(
            _model_choices(models, task),
            value=model,
            allow_custom_value=True,
            label="Model",
            info="of the list, or the path of a config file",
            elem_id="model",
        ),
        "weights": gr.Textbox(
            models.first_weights(task, model),
            label="Weights",
            info="path of a checkpoint; empty fetches official ones",
            max_lines=1,
            elem_id="weights",
        ),
        "score": gr.Slider(0, 1, value=0.5, step=0.05, label="Least score of objects", elem_id="score"),
        "run": gr.Button("Run", variant="primary", elem_id="run"),
    }
    return asked


def _outputs(gr: Any, models: Models) -> dict[str, Any]:
    """Make the right half: what is shown."""
    shown = {"message": gr.HTML(status_html(_welcome(models)), elem_id="message"), "answer": gr.State(None)}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=280):
            shown["drawing"] = gr.Image(
                label="Answer",
                show_label=False,
                interactive=False,
                format="png",
                height=_HEIGHT,
                buttons=["download", "fullscreen"],
                elem_id="drawing",
                alt_text="The picture with the answer drawn in; the table has it in words",
            )
        with gr.Column(scale=3, min_width=220):
            shown["table"] = gr.HTML(elem_id="table")
    gr.Markdown("## Where the scans look")
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=240):
            shown["layer"] = gr.Dropdown([], label="Layer", elem_id="layer")
            shown["kind"] = gr.Radio(
                [(name, key) for key, name in KIND_NAMES.items()],
                value=next(iter(KIND_NAMES)),
                label="Map",
                elem_id="kind",
            )
            with gr.Row():
                shown["row"] = gr.Number(0, label="Row", precision=0, minimum=0, elem_id="row", min_width=70)
                shown["column"] = gr.Number(0, label="Column", precision=0, minimum=0, elem_id="column", min_width=70)
            shown["look"] = gr.Button("Show map", elem_id="look")
        with gr.Column(scale=7, min_width=280):
            shown["scans"] = gr.HTML(elem_id="scans")
    return shown


def _welcome(models: Models) -> str:
    trained = [task for task in TASKS if models.first_weights(task, str(demo_config(task)))]
    if trained:
        return "Ready. Choose a sample, or upload a picture, and press Run."
    return (
        f"There is no trained demo in {models.demo_dir}: run `make demo` first, or type the path of a checkpoint, or "
        "choose a model whose official weights can be fetched."
    )


def _model_choices(models: Models, task: str) -> list[tuple[str, str]]:
    title = next(stage.title for stage in STAGES if stage.name == task)
    own = str(demo_config(task))
    return [(f"Demo: {title} (digits)" if name == own else name, name) for name in models.names(task)]


def _connect_inputs(models: Models, samples: Sequence[Sample], asked: Mapping[str, Any]) -> None:
    """Let a sample become the picture, and the choices of models and weights follow the task."""
    gr = optional_package("gradio", "app")

    def for_task(task: str) -> tuple[Any, str]:
        model = str(demo_config(task))
        choices = gr.update(choices=_model_choices(models, task), value=model)
        return choices, models.first_weights(task, model)

    def for_model(task: str, model: str | None) -> str:
        return models.first_weights(task, model or "")

    quiet = dict(api_visibility="private", show_progress="hidden")
    for button, sample in zip(asked["samples"], samples, strict=True):
        button.click(functools.partial(str, sample.path), None, asked["image"], **quiet)
    asked["task"].input(for_task, asked["task"], [asked["model"], asked["weights"]], **quiet)
    asked["model"].input(for_model, [asked["task"], asked["model"]], asked["weights"], **quiet)


def _connect_run(gr: Any, models: Models, asked: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Let Run show the answer, then the scan map of its first pixel."""

    def run(
        image: Mapping[str, Any] | None, task: str, model: str | None, weights: str | None, score: float
    ) -> tuple[Any, ...]:
        path = None if image is None else image.get("path")
        found, problem = _guarded(
            lambda: answer(models, Request(task, (model or "").strip(), (weights or "").strip()), path, float(score))
        )
        if found is None:
            return None, problem, None, "", gr.update(choices=[], value=None), 0, 0, ""
        layers, problem = _guarded(lambda: answer_layers(models, found))
        if layers is None:
            choices = gr.update(choices=[], value=None)
        else:
            named = [(f"{each.columns} x {each.rows}, {each.name}", each.name) for each in layers[0]]
            choices = gr.update(choices=named, value=layers[1])
        row, column = found.pixel
        status = status_html(found.timing)
        return found, status, found.drawing, table_html(found.table), choices, row, column, problem

    asks = [asked[name] for name in ("image", "task", "model", "weights", "score")]
    shows = [shown[name] for name in ("answer", "message", "drawing", "table", "layer", "row", "column", "scans")]
    # preprocess=False: a broken picture comes to us, not to gradio, whose message says less. It still checks that the
    # path is that of an upload.
    settings: dict[str, Any] = dict(
        preprocess=False, concurrency_id=_QUEUE, concurrency_limit=1, api_visibility="private",
        show_progress_on=[shown["drawing"]],
    )  # fmt: skip
    for trigger in (asked["run"].click, asked["weights"].submit):
        trigger(run, asks, shows, **settings).then(_scanner(models), *_scan_ports(shown), **_scan_settings())


def _connect_scans(gr: Any, models: Models, shown: Mapping[str, Any]) -> None:
    """Let a click on the answer, the fields and the button show another scan map."""

    def click(found: Answer | None, event: gr.SelectData) -> tuple[Any, Any]:
        if found is None:
            return gr.skip(), gr.skip()
        factor = enlargement(found.picture)
        return event.index[1] // factor, event.index[0] // factor

    click.__annotations__["event"] = gr.SelectData
    scan = _scanner(models)
    shown["drawing"].select(
        click, shown["answer"], [shown["row"], shown["column"]], api_visibility="private", show_progress="hidden"
    ).then(scan, *_scan_ports(shown), **_scan_settings())
    for trigger in (
        shown["look"].click, shown["layer"].input, shown["kind"].input, shown["row"].submit, shown["column"].submit,
    ):  # fmt: skip
        trigger(scan, *_scan_ports(shown), **_scan_settings())


def _scan_ports(shown: Mapping[str, Any]) -> tuple[list[Any], Any]:
    return [shown[name] for name in ("answer", "layer", "kind", "row", "column", "scans")], shown["scans"]


def _scan_settings() -> dict[str, Any]:
    return dict(preprocess=False, concurrency_id=_QUEUE, concurrency_limit=1, api_visibility="private")


def _scanner(models: Models) -> Callable[..., str]:
    def scan(found: Answer | None, layer: str | None, kind: str, row: Any, column: Any, before: str) -> str:
        if found is None or layer is None:  # nothing was answered, or nothing scans and the page says so
            return before or ""
        pixel = (int(row or 0), int(column or 0))
        view, problem = _guarded(lambda: scan_view(models, found, pixel, layer, kind))
        return problem if view is None else scan_html(view)

    return scan


def _guarded(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return what came out and nothing, or None and what the page says of the error.

    Only errors that are meant to be read become text; others are defects, which gradio prints with their traceback.
    """
    try:
        return work(), ""
    except MMVMambaError as error:
        return None, error_html(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, error_html("There was not enough memory for this picture. Use a smaller picture or model.")


__all__ = ["TITLE", "build_page"]
