"""Images that the models of a registered name are trained on: two sets of one name move no champion of each other."""

from collections.abc import Collection, Mapping

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from components.runtime.tracking.names import registered_name
from components.runtime.tracking.runs import is_new

DATA = "cascade.data"  # of a registered model, and of a run: the address of its images
CHOSEN = "cascade.chosen_name"  # of a run: whether the user named its models, and so takes a name over


def clash(name: str, data: str, theirs: str) -> str:
    """The message about two sets of one name, in one line."""
    own = name.removeprefix("image-cascade-")
    return f"{name} holds models of {theirs}, not of {data}: choose a name with --name (--name {own} takes it over)"


def find_clash(models: str, stages: Collection[str], data: str, *, tracking_uri: str) -> str | None:
    """The `clash` of the first of a run's names that stands for other images. Raises whatever MLflow raises while it
    is away."""
    if is_new(tracking_uri):
        return None
    own, client = registered_name(models), MlflowClient(tracking_uri)
    names = {own, *(registered_name(models, stage=stage) for stage in stages)}
    for found in client.search_registered_models(f"name LIKE '{own}%'", max_results=1000, order_by=["name"]):
        theirs = found.tags.get(DATA)
        if found.name in names and theirs and theirs != data:
            return clash(found.name, data, theirs)
    return None


def take(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str | None:
    """Write down what the models of a name are trained on, by the tags of a run that registers one. Returns a line as
    `clash` where they are trained on other images, and the user has not chosen the name."""
    data = tags.get(DATA)
    if data is None:
        return None
    theirs = _data_of(client, name)
    if theirs and theirs != data and CHOSEN not in tags:
        return clash(name, data, theirs)
    if theirs is None:
        try:
            client.create_registered_model(name, tags={DATA: data})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
    elif theirs != data:
        client.set_registered_model_tag(name, DATA, data)
    return None


def _data_of(client: MlflowClient, name: str) -> str | None:
    """The images of a registered model; empty where nothing is known of them, None where there is no such model."""
    found = client.search_registered_models(f"name = '{name}'")
    return found[0].tags.get(DATA, "") if found else None
