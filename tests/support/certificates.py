"""Certificates for tests of TLS: a root, and those that it signs.

They have what RFC 5280 asks of certificates, as Python's clients do since 3.13
(`ssl.VERIFY_X509_STRICT`): the identifiers of keys, and what a root's key is for.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_DAY = datetime.timedelta(days=1)

#: What a root's key is for.
_SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


class Authority:
    """A root, whose certificate is the only one in a folder.

    :param name: what it calls itself.
    :param posing_as: it says of the keys of this one that they have signed.
    :ivar folder: for `trustRoots=` and `caCertsDir=`.
    :ivar file: the certificate.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "the root",
        posing_as: Authority | None = None,
    ) -> None:
        self._name = name
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._signer: x509.SubjectKeyIdentifier = (
            x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
            if posing_as is None
            else posing_as._signer
        )
        self._made = 0
        self.folder = folder / "roots"
        self.folder.mkdir()
        self.file = self.folder / "root.pem"
        builder = self._builder(name, self._key.public_key(), datetime.timedelta())
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        builder = builder.add_extension(_SIGNS, True)
        certificate = builder.sign(self._key, hashes.SHA256())
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(
        self, common: str, key: Any, ago: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC) - ago
        self._made += 1
        own = x509.SubjectKeyIdentifier.from_public_key(key)
        signer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            self._signer
        )
        return (
            x509.CertificateBuilder()
            .subject_name(_name(common))
            .issuer_name(_name(self._name))
            .public_key(key)
            .serial_number(self._made)
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(own, False)
            .add_extension(signer, False)
        )

    def issue(
        self,
        *names: str,
        common: str = "localhost",
        ago: datetime.timedelta = datetime.timedelta(),
        alternatives: Sequence[x509.GeneralName] = (),
    ) -> Path:
        """A key and its certificate, in one file.

        :param names: the host names and addresses that it is for; without any it has
            no subjectAltName.
        :param alternatives: more of them, as cryptography has them.
        :param ago: how long ago it was issued, for two days.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(common, key.public_key(), ago)
        found = [*map(_alternative, names), *alternatives]
        if found:
            builder = builder.add_extension(x509.SubjectAlternativeName(found), False)
        path = self._folder / f"{self._made}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + builder.sign(self._key, hashes.SHA256()).public_bytes(
                serialization.Encoding.PEM
            )
        )
        return path


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def server_context(pem: Path) -> ssl.SSLContext:
    """What a TLS server needs, with this key and certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    return context
