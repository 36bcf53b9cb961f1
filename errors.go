package aegis

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/nats-io/nats.go"
)

// This file is errors: what fails in aegis, or in a service that was called, its form on the wire, and which failures may pass by
// themselves. At its end are the names that are valid in subjects.

// An Error is what fails in aegis, here or in a service that was called.
//
// Code is in upper snake case: one of the sentinels', or a handler's own. Source is the service that reports the error, ""
// for this one. NotRun says that the request certainly did not reach a handler, so that sending it again can do no harm.
// Cause is the error of the service behind Source, and so on over all hops.
//
// [errors.Is] compares the codes, along the whole chain: errors.Is(err, aegis.ErrNotFound) holds on both sides of the wire.
// An error with the code DEADLINE_EXCEEDED also is [context.DeadlineExceeded], one with CANCELED [context.Canceled].
type Error struct {
	Code    string            `json:"code"`
	Message string            `json:"message,omitempty"`
	Source  string            `json:"source,omitempty"`
	Details map[string]string `json:"details,omitempty"`
	NotRun  bool              `json:"not_run,omitempty"`
	Cause   *Error            `json:"cause,omitempty"`
}

// The errors that aegis itself makes, to be compared with [errors.Is].
var (
	ErrInvalid       = &Error{Code: "INVALID_ARGUMENT"}  // a name, option or payload that can't be used
	ErrNotFound      = &Error{Code: "NOT_FOUND"}         // there is no such thing
	ErrNotActive     = &Error{Code: "NOT_ACTIVE"}        // another instance leads
	ErrFenced        = &Error{Code: "FENCED"}            // leadership was lost while the handler ran
	ErrUnavailable   = &Error{Code: "UNAVAILABLE"}       // no instance or no server can be reached
	ErrTimeout       = &Error{Code: "DEADLINE_EXCEEDED"} // no answer in time
	ErrOverloaded    = &Error{Code: "OVERLOADED"}        // the handler is at its limit
	ErrUnimplemented = &Error{Code: "UNIMPLEMENTED"}     // the service has no such method
	ErrInternal      = &Error{Code: "INTERNAL"}          // a handler's plain error, or its panic
	ErrCircuitOpen   = &Error{Code: "CIRCUIT_OPEN"}      // the service failed too often just now
	ErrCanceled      = &Error{Code: "CANCELED"}          // ctx was cancelled
	ErrClosed        = &Error{Code: "CLOSED"}            // the service was stopped
	ErrDenied        = &Error{Code: "PERMISSION_DENIED"} // the server's permissions don't allow it
)

// Error is the path over the services that the error came along, with the code and the message of each that added one.
func (e *Error) Error() string {
	var parts []string
	for ; e != nil; e = e.Cause {
		parts = append(parts, e.Source)
		if c := e.Cause; c == nil || c.Code != e.Code || c.Message != e.Message {
			parts = append(parts, e.Code, e.Message)
		}
	}
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), ": ")
}

// Is compares the code.
func (e *Error) Is(target error) bool {
	switch target {
	case context.DeadlineExceeded:
		return e.Code == ErrTimeout.Code
	case context.Canceled:
		return e.Code == ErrCanceled.Code
	}
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Unwrap is the cause.
func (e *Error) Unwrap() error { return e.Cause.orNil() }

// orNil is e as an error, which is nil if e is.
func (e *Error) orNil() error {
	if e == nil {
		return nil
	}
	return e
}

func newError(kind *Error, format string, args ...any) *Error {
	return &Error{Code: kind.Code, Message: fmt.Sprintf(format, args...)}
}

func notRun(e *Error) *Error {
	e.NotRun = true
	return e
}

// asError is the error that a handler's caller gets to see for err, nil for nil.
func asError(err error) *Error {
	e, ok := errors.AsType[*Error](err)
	switch {
	case err == nil:
		return nil
	case ok && e == nil:
		return newError(ErrInternal, "the handler returned a nil *aegis.Error as an error: return nil itself")
	case !ok && errors.Is(err, context.DeadlineExceeded):
		return newError(ErrTimeout, "%v", err)
	case !ok && errors.Is(err, context.Canceled):
		return newError(ErrCanceled, "%v", err)
	case !ok:
		return newError(ErrInternal, "%v", err)
	}
	out := *e
	own := e.Message
	if e.Source != "" { // it came from a service that the handler called
		out.Cause, own = e, ""
	}
	if error(e) != err { // keep the words that it was wrapped in
		out.Message = strings.TrimSuffix(strings.Replace(err.Error(), e.Error(), own, 1), ": ")
	}
	return &out
}

// passing are the codes of what may have passed by itself in a moment.
var passing = []string{ErrUnavailable.Code, ErrOverloaded.Code, ErrNotActive.Code, ErrCircuitOpen.Code}

// isMissing tells that a message was sent but not answered.
func isMissing(failure *Error) bool {
	return !failure.NotRun && (failure.Code == ErrUnavailable.Code || failure.Code == ErrTimeout.Code)
}

// mayPass tells that what may be sent again could succeed then.
func mayPass(failure *Error) bool {
	return failure != nil && (isMissing(failure) || failure.NotRun && slices.Contains(passing, failure.Code))
}

const (
	headerErrorCode = "Nats-Service-Error-Code" // numeric, as HTTP has them
	headerErrorText = "Nats-Service-Error"
)

// statusCodes give the error codes a number for callers that only know micro's headers, and back.
var statusCodes = []struct {
	kind   *Error
	status string
}{
	{ErrInvalid, "400"}, {ErrDenied, "403"}, {ErrNotFound, "404"}, {ErrFenced, "409"}, {ErrNotActive, "421"}, {ErrOverloaded, "429"}, {ErrCanceled, "499"},
	{ErrInternal, "500"}, {ErrUnimplemented, "501"}, {ErrUnavailable, "503"}, {ErrTimeout, "504"}, {ErrCircuitOpen, "503"}, {ErrClosed, "503"},
}

const handlerStatus = "422" // of a code that is the handler's own

const maxErrorText = 1 << 10

// encode puts the error into headers, for any NATS client, and into a payload, whole.
func (e *Error) encode(c Codec) (nats.Header, []byte) {
	status := handlerStatus
	for _, s := range statusCodes {
		if s.kind.Code == e.Code {
			status = s.status
			break
		}
	}
	if c != JSON {
		c = MsgPack
	}
	data, _ := c.Marshal(e) // strings and booleans only: it can't fail
	text := e.Error()
	return nats.Header{headerErrorCode: {status}, headerErrorText: {text[:min(len(text), maxErrorText)]}}, data
}

// decodeError is the error that an answer stands for, nil if it is a success.
func decodeError(m *nats.Msg) *Error {
	status := m.Header.Get(headerErrorCode)
	if status == "" {
		return nil
	}
	e := &Error{}
	if c := sniff(m.Data); c != nil && c.Unmarshal(m.Data, e) == nil && e.Code != "" {
		return e
	}
	return newError(kindOf(status), "%s", m.Header.Get(headerErrorText)) // of a service that isn't aegis
}

// kindOf is the error that a status means.
func kindOf(status string) *Error {
	for _, s := range statusCodes {
		if s.status == status {
			return s.kind
		}
	}
	return ErrInternal
}

// cut is e without what makes it too large to be stored.
func (e *Error) cut() *Error {
	out := *e
	out.Message = out.Message[:min(len(out.Message), maxErrorText)]
	if data, err := MsgPack.Marshal(&out); err == nil && len(data) > letterRoom {
		out.Details, out.Cause = nil, nil
	}
	return &out
}

// checkNames checks the names of a service and of its method or command.
func checkNames(service, what, name string) *Error {
	switch {
	case !isName(service, maxService):
		return notRun(newError(ErrInvalid, "service %q: want a letter, then letters, digits, - and _, at most %d", service, maxService))
	case !isName(name, 128), strings.Contains(name, "-"):
		return notRun(newError(ErrInvalid, "%s %q: want a letter, then letters, digits and _", what, name))
	}
	return nil
}

func isName(s string, most int) bool {
	return isToken(s, most) && (s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z')
}

// isToken tells whether s is one token of a subject, of letters, digits, - and _.
func isToken(s string, most int) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= most
}

// covers tells whether all subjects that match the pattern sub match pattern, too.
func covers(pattern, sub string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(sub, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s), s[i] == ">", token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}
