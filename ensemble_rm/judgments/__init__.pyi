from .agreement import AgreementReport as AgreementReport, agreement_report as agreement_report
from .backup import backup_store as backup_store
from .checking import StoreCheck as StoreCheck, check_store as check_store
from .exports import export_judgments as export_judgments, judgment_dataset as judgment_dataset
from .filter import JudgmentFilter as JudgmentFilter
from .imports.formats import (
    Imported as Imported,
    ImportFormat as ImportFormat,
    ImportOptions as ImportOptions,
    Row as Row,
    register_format as register_format,
)
from .imports.importing import import_judgments as import_judgments
from .judgment import Judgment as Judgment
from .store import JudgmentStore as JudgmentStore
