"""The program of a registered model: rows in, images out.

MLflow runs this file unchanged, with the packed code beside it.
"""

from pathlib import Path

from mlflow.models import Model, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from components.models.file_list import check_files
from components.sampling.answers import REGISTERED, predictor_of
from components.sampling.requests import RequestRow


class CascadeModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        model = Path(context.artifacts["model"])
        packed, about = model.parents[1], {}  # MLflow keeps it in `artifacts`, and tries it once before all is packed
        if (packed / "MLmodel").is_file():
            check_files(packed, "this model")
            about = Model.load(str(packed)).metadata or {}
        self.answer = predictor_of(model, name=about.get(REGISTERED))

    def predict(self, model_input: list[RequestRow]) -> list[str]:
        """Returns a string for each row: base64 PNG, or JSON.
        Raises ValueError, in one line, for a row that the model can't answer."""
        return self.answer(model_input)


set_model(CascadeModel())
