from .request import TrainingRequest as TrainingRequest
from .run import plan as plan, train as train, train_request as train_request
