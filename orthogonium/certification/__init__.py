from orthogonium.certification.attacks import AttackResult, attack
from orthogonium.certification.certificates import Certificate, certified_accuracy, certify
from orthogonium.certification.lipschitz_product import LayerBound, LipschitzProduct, lipschitz_product
from orthogonium.certification.operator_norm import absolute_norm_bound, operator_norm_bound

__all__ = [
    "AttackResult",
    "Certificate",
    "LayerBound",
    "LipschitzProduct",
    "absolute_norm_bound",
    "attack",
    "certified_accuracy",
    "certify",
    "lipschitz_product",
    "operator_norm_bound",
]
