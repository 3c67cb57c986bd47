from orthogonium.certification.attacks import AttackResult, attack
from orthogonium.certification.certificates import Certificate, certified_accuracy, certify
from orthogonium.certification.network_bound import LayerBound, NetworkBound, lipschitz_bound
from orthogonium.certification.operator_norm import absolute_norm_bound, operator_norm_bound
from orthogonium.certification.program import plain_network
from orthogonium.certification.rules import EXACT, Refused, Response, Rounding, Variable, lipschitz_rule

__all__ = [
    "EXACT",
    "AttackResult",
    "Certificate",
    "LayerBound",
    "NetworkBound",
    "Refused",
    "Response",
    "Rounding",
    "Variable",
    "absolute_norm_bound",
    "attack",
    "certified_accuracy",
    "certify",
    "lipschitz_bound",
    "lipschitz_rule",
    "operator_norm_bound",
    "plain_network",
]
