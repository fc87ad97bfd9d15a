"""The deployment that answers HTTP: it checks requests, and finds each one its replica."""

# No postponed annotations: Ray sends the class by value, and FastAPI would not find their names.
from typing import Annotated

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from .errors import RequestError
from .folder import Folder
from .order import Order, Picture, Refusal
from .settings import Routing, Settings
from .stack import Stack

__all__ = ["Gate", "PictureRequest"]

_MOST_LORAS = 8
_MOST_STEPS = 100
_UNAVAILABLE = 503

app = FastAPI(title="qwenlora")


class NamedLora(BaseModel):
    """A LoRA as a request names it.

    Attributes:
        name: Its file below the folder, without `.safetensors`.
        strength: Factor on its whole delta; `Stack` checks that it is finite.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=255)]
    strength: float = 1.0


class PictureRequest(BaseModel):
    """The body of a request.

    Attributes:
        prompt: The text.
        loras: The stack; its order makes no difference.
        seed: Seed of the noise.
        steps: Sampling steps.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(max_length=4096)]
    loras: Annotated[list[NamedLora], Field(max_length=_MOST_LORAS)] = []
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    steps: Annotated[int, Field(ge=1, le=_MOST_STEPS)] = 8


def _headers(picture: Picture, attempt: int) -> dict[str, str]:
    """Everything about a picture that is none of its pixels."""
    return {
        "qwenlora-set": picture.met.value,
        "qwenlora-compose-s": f"{picture.compose_s:.6f}",
        "qwenlora-report": picture.report.encode("ascii", "backslashreplace").decode(),
        "qwenlora-kept-bytes": str(picture.kept_bytes),
        "qwenlora-process": str(picture.process),
        "qwenlora-attempt": str(attempt),
    }


# All that it names stands above: it is sent by value from here.
@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
@serve.ingress(app)
class Gate:
    """Checks requests before a replica of the model sees them."""

    def __init__(self, painter: DeploymentHandle, settings: Settings) -> None:
        """Take the deployment that paints."""
        self._painter = painter
        self._settings = settings
        self._folder = Folder(settings.folder)

    @app.get("/loras")
    def loras(self) -> list[str]:
        """Names of all LoRAs."""
        return self._folder.names()

    @app.post("/pictures", response_class=Response)
    async def pictures(self, request: PictureRequest) -> Response:
        """Paint a picture: a PNG, and headers that tell how it was made.

        Status 400 says that a name is none, 404 that a LoRA is not there, 422 that its file cannot
        be used or that the request is malformed, 503 that the replicas died that had it.
        """
        try:
            stack = Stack.of((lora.name, lora.strength) for lora in request.loras)
            # Here, since a name that is not there would make a replica drop a stack for it.
            self._folder.check(stack)
        except RequestError as error:
            raise HTTPException(error.status, error.reason) from None
        order = Order(request.prompt, request.seed, request.steps)
        answer, attempt = await self._paint(stack, order)
        if isinstance(answer, Refusal):
            raise HTTPException(answer.status, answer.reason)
        return Response(answer.png, media_type="image/png", headers=_headers(answer, attempt))

    async def _paint(self, stack: Stack, order: Order) -> tuple[Picture | Refusal, int]:
        """The answer of a replica, and the attempt that gave it.

        Ray itself gives a request that a replica has not accepted to another one. One that was
        accepted may have had effects, for all that Ray knows. Painting has none, so it is repeated.

        Raises:
            HTTPException: All attempts met replicas that died.
        """
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return await self._handle(stack).paint.remote(stack, order), attempt
            except RayActorError:
                continue
        raise HTTPException(
            _UNAVAILABLE,
            f"every replica died that had this request; attempts: {self._settings.attempts}",
            headers={"retry-after": "10"},
        )

    def _handle(self, stack: Stack) -> DeploymentHandle:
        """The way to the replicas, those first that hold the stack."""
        if self._settings.routing is Routing.AT_RANDOM or not stack.loras:
            return self._painter
        return self._painter.options(multiplexed_model_id=stack.model_id)
