from .http.app import create_app as create_app
from .http.auth import Token as Token
from .lifecycle import serve as serve
from .options import (
    BatchOptions as BatchOptions,
    Limits as Limits,
    NetworkOptions as NetworkOptions,
    ServerOptions as ServerOptions,
)
from .service import RequestContext as RequestContext
from .wire.format import Route as Route, WireFormat as WireFormat
from .wire.raw_text import RawText as RawText, TurnTemplate as TurnTemplate
from .wire.registry import register as register
