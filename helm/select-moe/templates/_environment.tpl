{{/* How a container finds S3, MLflow and the database: variables, certificates. Every helper takes the root context unless it says otherwise. */}}

{{/* Certificates of a site's own authority, for every client in the pod: S3, MLflow, PostgreSQL. */}}
{{- define "select-moe.caEnv" -}}
{{- if .Values.certificates.existingConfigMap.name -}}
{{- range list "AWS_CA_BUNDLE" "REQUESTS_CA_BUNDLE" "SSL_CERT_FILE" "PGSSLROOTCERT" }}
- name: {{ . }}
  value: /etc/certificates/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- define "select-moe.caMount" -}}
{{- if .Values.certificates.existingConfigMap.name -}}
- name: certificates
  mountPath: /etc/certificates
  readOnly: true
{{- end }}
{{- end }}

{{- define "select-moe.caVolume" -}}
{{- with .Values.certificates.existingConfigMap }}
{{- if .name -}}
- name: certificates
  configMap:
    name: {{ .name }}
    items:
      - key: {{ .key }}
        path: ca.crt
{{- end }}
{{- end }}
{{- end }}

{{/* An environment variable out of a Secret. Takes (dict "name" VARIABLE "secret" NAME "key" KEY). */}}
{{- define "select-moe.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end }}

{{/* The credentials of the bucket: variable to key of the Secret, as JSON; none where the cloud knows the service account. */}}
{{- define "select-moe.s3Keys" -}}
{{- $keys := .Values.objectStorage.existingSecret }}
{{- $all := dict "AWS_ACCESS_KEY_ID" $keys.accessKeyKey "AWS_SECRET_ACCESS_KEY" $keys.secretKeyKey }}
{{- ternary (dict) $all .Values.objectStorage.external.workloadIdentity | toJson }}
{{- end }}

{{/* What a client of the bucket needs. */}}
{{- define "select-moe.s3Env" -}}
{{- range $variable, $key := include "select-moe.s3Keys" . | fromJson }}
{{ include "select-moe.secretEnv" (dict "name" $variable "secret" (include "select-moe.s3Secret" $) "key" $key) }}
{{- end }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.objectStorage.region | quote }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ include "select-moe.s3Endpoint" . | quote }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ include "select-moe.s3Endpoint" . | quote }}
{{- end }}

{{/* Where MLflow's own database is; user and password go to the driver by its own variables. */}}
{{- define "select-moe.mlflowDatabaseUri" -}}
{{- $database := .Values.mlflow.database }}
{{- if eq $database.type "sqlite" -}}
sqlite:////data/mlflow.db
{{- else -}}
{{- $postgresql := $database.postgresql }}
{{- printf "postgresql+psycopg://%s:%d/%s?sslmode=%s" $postgresql.host (int $postgresql.port) $postgresql.name $postgresql.sslMode }}
{{- end }}
{{- end }}

{{- define "select-moe.mlflowDatabaseEnv" -}}
- name: MLFLOW_BACKEND_STORE_URI
  value: {{ include "select-moe.mlflowDatabaseUri" . | quote }}
{{- if eq .Values.mlflow.database.type "postgresql" }}
{{- $secret := .Values.mlflow.database.postgresql.existingSecret }}
{{ include "select-moe.secretEnv" (dict "name" "PGUSER" "secret" $secret.name "key" $secret.userKey) }}
{{ include "select-moe.secretEnv" (dict "name" "PGPASSWORD" "secret" $secret.name "key" $secret.passwordKey) }}
{{- end }}
{{- end }}

{{/* What a client of MLflow needs. */}}
{{- define "select-moe.mlflowClientEnv" -}}
- name: MLFLOW_TRACKING_URI
  value: {{ include "select-moe.mlflowUrl" . | quote }}
{{- if .Values.mlflow.auth.enabled }}
- name: MLFLOW_TRACKING_USERNAME
  value: {{ .Values.mlflow.auth.username | quote }}
{{ include "select-moe.secretEnv" (dict "name" "MLFLOW_TRACKING_PASSWORD" "secret" (include "select-moe.mlflowAuthSecret" .) "key" .Values.mlflow.auth.existingSecret.passwordKey) }}
{{- end }}
{{- end }}
