from .agreement import AgreementReport as AgreementReport, agreement_report as agreement_report
from .exports import export_judgments as export_judgments, judgment_dataset as judgment_dataset
from .filter import JudgmentFilter as JudgmentFilter
from .imports.importing import import_judgments as import_judgments
from .imports.rows import Imported as Imported, ImportOptions as ImportOptions
from .judgment import Judgment as Judgment
from .store import JudgmentStore as JudgmentStore
