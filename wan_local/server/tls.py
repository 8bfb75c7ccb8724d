"""A certificate for loopback, made here: what `--tls` serves with, and what clients must trust.

Takes a folder; gives a certificate and key for this machine's own names, signed by an authority that exists for a
moment only, and a bundle of that authority beside the usual ones, for SSL_CERT_FILE. Nothing is installed anywhere.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAYS = 397  # what clients accept at most
_RENEW_DAYS = 30


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of the server's certificate and key, and of the bundle that makes a client trust it."""

    certificate: Path
    key: Path
    bundle: Path


def ensure_certificate(folder: Path, host: str) -> Certificate:
    """Return the folder's certificate, a new one if there is none for this host or it ends soon."""
    found = Certificate(folder / "server.pem", folder / "server.key", folder / "bundle.pem")
    if not _is_good(found, host):
        folder.mkdir(parents=True, exist_ok=True)
        _make(found, host)
    return found


def _is_good(found: Certificate, host: str) -> bool:
    if not all(path.is_file() for path in (found.certificate, found.key, found.bundle)):
        return False
    try:
        certificate = x509.load_pem_x509_certificate(found.certificate.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    lasts = certificate.not_valid_after_utc - datetime.now(UTC) > timedelta(days=_RENEW_DAYS)
    return lasts and _name(host) in list(names)


def _make(target: Certificate, host: str) -> None:
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wan_local on this machine")])
    root = (
        _builder(authority, authority, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names = list(dict.fromkeys([_name(host), *map(_name, ("127.0.0.1", "::1", "localhost"))]))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wan_local")])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    leaf = (
        _builder(subject, authority, server_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    descriptor = os.open(target.key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
    target.certificate.write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    target.bundle.write_bytes(Path(certifi.where()).read_bytes() + b"\n" + root.public_bytes(pem))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
