"""JSON Schemas of custom resources: the fields that such a chart may set.

Stricter than the operators' own in one respect: what is not named here is an error, as `kubectl apply` would drop it.
"""

from __future__ import annotations

from typing import Any


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_text = {"type": "string"}
_texts = {"type": "object", "additionalProperties": _text}
_duration = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
    "minLength": 1,
}
_metadata = _object(["name", "namespace"], name=_text, namespace=_text, labels=_texts, annotations=_texts)
_relabel = _object(
    [],
    sourceLabels={"type": "array", "items": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}},
    separator=_text,
    targetLabel=_text,
    regex=_text,
    modulus={"type": "integer"},
    replacement=_text,
    action={
        "enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep", "lowercase", "uppercase"]
    },
)


def _kind(kind: str, spec: dict[str, Any], version: str = "monitoring.coreos.com/v1") -> dict[str, Any]:
    return _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=_metadata,
        spec=spec,
    )


SERVICE_MONITOR = _kind(
    "ServiceMonitor",
    _object(
        ["selector", "endpoints"],
        selector=_object(["matchLabels"], matchLabels=_texts),
        namespaceSelector=_object([], any={"type": "boolean"}, matchNames={"type": "array", "items": _text}),
        jobLabel=_text,
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["port"],
                port=_text,
                path=_text,
                scheme={"enum": ["http", "https"]},
                interval=_duration,
                scrapeTimeout=_duration,
                honorLabels={"type": "boolean"},
                relabelings={"type": "array", "items": _relabel},
                metricRelabelings={"type": "array", "items": _relabel},
                authorization=_object(
                    ["credentials"], type=_text, credentials=_object(["name", "key"], name=_text, key=_text)
                ),
            ),
        },
    ),
)

PROMETHEUS_RULE = _kind(
    "PrometheusRule",
    _object(
        ["groups"],
        groups={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "rules"],
                name={"type": "string", "minLength": 1},
                interval=_duration,
                limit={"type": "integer"},
                rules={
                    "type": "array",
                    "items": _object(
                        ["expr"],
                        record=_text,
                        alert=_text,
                        expr={"type": ["string", "integer"]},
                        **{"for": _duration},
                        keep_firing_for=_duration,
                        labels=_texts,
                        annotations=_texts,
                    )
                    | {"oneOf": [{"required": ["record"]}, {"required": ["alert"]}]},
                },
            ),
        },
    ),
)

_headers = {"type": "array", "items": _object(["name", "value"], name=_text, value=_text, type=_text)}
_gateway_duration = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}

HTTP_ROUTE = _kind(
    "HTTPRoute",
    _object(
        ["parentRefs", "rules"],
        parentRefs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name"],
                group=_text,
                kind=_text,
                name=_text,
                namespace=_text,
                sectionName=_text,
                port={"type": "integer"},
            ),
        },
        hostnames={"type": "array", "items": _text},
        rules={
            "type": "array",
            "items": _object(
                ["backendRefs"],
                matches={
                    "type": "array",
                    "items": _object(
                        [],
                        path=_object([], type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=_text),
                        headers=_headers,
                        method=_text,
                    ),
                },
                filters={"type": "array"},
                timeouts=_object([], request=_gateway_duration, backendRequest=_gateway_duration),
                backendRefs={
                    "type": "array",
                    "items": _object(
                        ["name", "port"], name=_text, port={"type": "integer"}, weight={"type": "integer"}
                    ),
                },
            ),
        },
    ),
    "gateway.networking.k8s.io/v1",
)

EXTERNAL_SECRET = _kind(
    "ExternalSecret",
    _object(
        ["secretStoreRef", "target"],
        refreshInterval=_duration,
        secretStoreRef=_object(["name"], name=_text, kind={"enum": ["SecretStore", "ClusterSecretStore"]}),
        target=_object([], name=_text, creationPolicy={"enum": ["Owner", "Orphan", "Merge", "None"]}),
        data={
            "type": "array",
            "items": _object(
                ["secretKey", "remoteRef"],
                secretKey=_text,
                remoteRef=_object(["key"], key=_text, property=_text, version=_text),
            ),
        },
        dataFrom={"type": "array", "items": _object([], extract=_object(["key"], key=_text, property=_text))},
    ),
    "external-secrets.io/v1",
)

SCHEMAS = {
    "ServiceMonitor": SERVICE_MONITOR,
    "PrometheusRule": PROMETHEUS_RULE,
    "HTTPRoute": HTTP_ROUTE,
    "ExternalSecret": EXTERNAL_SECRET,
}

_named = _object(["name"], name=_text, namespace=_text)
_count = {"type": "integer", "minimum": 0}

ANALYSIS_TEMPLATE = _kind(
    "AnalysisTemplate",
    _object(
        ["metrics"],
        args={"type": "array", "items": _object(["name"], name=_text, value=_text)},
        metrics={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "provider"],
                name=_text,
                interval=_duration,
                initialDelay=_duration,
                count=_count,
                failureLimit=_count,
                inconclusiveLimit=_count,
                consecutiveErrorLimit=_count,
                consecutiveSuccessLimit=_count,
                successCondition=_text,
                failureCondition=_text,
                provider=_object(
                    [],
                    web=_object(["url"], url=_text, method=_text, timeoutSeconds=_count, jsonPath=_text, body=_text),
                    job=_object(
                        ["spec"], metadata={"type": "object"}, spec={"type": "object", "required": ["template"]}
                    ),
                )
                | {"minProperties": 1, "maxProperties": 1},
            ),
        },
    ),
    "argoproj.io/v1alpha1",
)

METRIC_TEMPLATE = _kind(
    "MetricTemplate",
    _object(
        ["provider", "query"],
        provider=_object(
            ["type"],
            type={"enum": ["prometheus"]},
            address=_text,
            secretRef=_named,
            insecureSkipVerify={"type": "boolean"},
        ),
        query=_text,
    ),
    "flagger.app/v1beta1",
)

CANARY = _kind(
    "Canary",
    _object(
        ["targetRef", "service", "analysis"],
        targetRef=_object(["kind", "name"], apiVersion=_text, kind=_text, name=_text),
        service=_object(["port"], port=_count, targetPort=_count),
        analysis=_object(
            ["interval", "threshold"],
            interval={"type": "string", "pattern": "^[0-9]+(m|s)"},
            threshold={"type": "number"},
            iterations={"type": "number"},
            metrics={
                "type": "array",
                "items": _object(
                    ["name"],
                    name=_text,
                    interval={"type": "string", "pattern": "^[0-9]+(m|s)"},
                    thresholdRange=_object([], min={"type": "number"}, max={"type": "number"}),
                    templateRef=_named,
                ),
            },
            webhooks={
                "type": "array",
                "items": _object(
                    ["name", "url"],
                    name=_text,
                    url=_text,
                    type={"enum": ["confirm-rollout", "pre-rollout", "rollout", "confirm-promotion", "rollback"]},
                    timeout={"type": "string", "pattern": "^[0-9]+(m|s)"},
                    metadata=_texts,
                ),
            },
        ),
    ),
    "flagger.app/v1beta1",
)
