from orthogonium.certification.attacks import AttackResult, attack
from orthogonium.certification.certificates import Certificate, certified_accuracy, certify
from orthogonium.certification.lipschitz_product import LayerBound, LipschitzProduct, lipschitz_product

__all__ = [
    "AttackResult",
    "Certificate",
    "LayerBound",
    "LipschitzProduct",
    "attack",
    "certified_accuracy",
    "certify",
    "lipschitz_product",
]
