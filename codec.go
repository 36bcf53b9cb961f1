package aegis

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"
)

// This file has the two codecs, the detection of a received payload's format, and the check that keeps a hostile MessagePack
// payload from costing more memory or stack than its size justifies.

// A Codec encodes values as payloads and decodes payloads. Its methods must be safe for concurrent use.
//
// ContentType returns the MIME type of the codec's payloads, which must differ from those of [MsgPack] and [JSON]. A message has
// it in the header Content-Type if the format can't be detected from the first byte of the payload.
type Codec interface {
	Marshal(v any) ([]byte, error)
	Unmarshal(data []byte, v any) error
	ContentType() string
}

// The codecs that every service understands, whichever it uses to send.
//
// Both take the names of fields from the `json` struct tag. MsgPack is the default because it is smaller and faster. Before it
// decodes anything, it rejects a payload that ends in the middle of a value, has bytes left over, is nested deeper than 128
// levels, or declares more elements than it has bytes. Therefore decoding allocates at most a small multiple of the size of the
// payload times the size of the largest element of the target type.
var (
	MsgPack Codec = msgpackCodec{}
	JSON    Codec = jsonCodec{}
)

type jsonCodec struct{}

func (jsonCodec) Marshal(v any) ([]byte, error) { return json.Marshal(v) }

func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

func (jsonCodec) ContentType() string { return "application/json" }

type msgpackCodec struct{}

func (msgpackCodec) ContentType() string { return "application/msgpack" }

func (msgpackCodec) Marshal(v any) ([]byte, error) {
	data, p, err := marshal(MsgPack, v)
	data = bytes.Clone(data)
	p.release()
	return data, err
}

// marshal encodes v with c. MessagePack goes into the buffer of a pooled packer p, and data is valid until the caller releases p.
// With any other codec p is nil. A p that is never released is garbage-collected.
func marshal(c Codec, v any) (data []byte, p *packer, err error) {
	if c != MsgPack {
		data, err = c.Marshal(v)
		return data, nil, err
	}
	p = packers.Get().(*packer)
	p.buf.Reset()
	p.enc.ResetWriter(&p.buf) // Reset would also clear the struct tag and the flags
	err = p.enc.Encode(v)
	return p.buf.Bytes(), p, err
}

// release returns p, which may be nil, to the pool. The data that was encoded with p must not be used afterwards.
func (p *packer) release() {
	if p != nil && p.buf.Cap() <= keepBuffer {
		packers.Put(p)
	}
}

func (msgpackCodec) Unmarshal(data []byte, v any) (err error) {
	if err := checkMsgPack(data); err != nil {
		return err
	}
	defer func() { // the decoder may panic, for example if a slice is to become a key in a map[any]any
		if p := recover(); p != nil {
			err = fmt.Errorf("msgpack: %v", p)
		}
	}()
	u := unpackers.Get().(*unpacker)
	u.src.Reset(data)
	u.dec.ResetReader(&u.src)
	err = u.dec.Decode(v)
	u.src.Reset(nil)
	if len(data) <= keepBuffer {
		unpackers.Put(u)
	}
	return err
}

// keepBuffer is the largest buffer, in bytes, that a pooled encoder or decoder may keep.
const keepBuffer = 64 << 10

type packer struct {
	buf bytes.Buffer
	enc *msgpack.Encoder
}

type unpacker struct {
	src bytes.Reader
	dec *msgpack.Decoder
}

var packers = sync.Pool{New: func() any {
	p := &packer{}
	p.enc = msgpack.NewEncoder(&p.buf)
	p.enc.SetCustomStructTag("json")
	p.enc.UseCompactInts(true)
	p.enc.SetSortMapKeys(true) // equal values give equal bytes
	return p
}}

var unpackers = sync.Pool{New: func() any {
	u := &unpacker{}
	u.dec = msgpack.NewDecoder(&u.src)
	u.dec.SetCustomStructTag("json")
	return u
}}

// contentType returns the content type of data if a receiver can't detect the format from the first byte, else "".
func contentType(c Codec, data []byte) string {
	if s := sniff(data); s != nil && s.ContentType() == c.ContentType() {
		return ""
	}
	return c.ContentType()
}

// codecFor returns the codec of a received payload: by its content type if the header has one, else by its first byte, else own.
func codecFor(h nats.Header, data []byte, own Codec) (Codec, error) {
	if label := h.Get(headerContentType); label != "" {
		mime, _, _ := strings.Cut(label, ";")
		for _, c := range [...]Codec{own, MsgPack, JSON} {
			if strings.EqualFold(strings.TrimSpace(mime), c.ContentType()) {
				return c, nil
			}
		}
		return nil, fmt.Errorf("the content type %q is not supported: send %s, %s or %s",
			label, MsgPack.ContentType(), JSON.ContentType(), own.ContentType())
	}
	if len(data) == 0 {
		return nil, errors.New("the payload is empty: send at least {}")
	}
	if c := sniff(data); c != nil {
		return c, nil
	}
	return own, nil
}

// sniff detects MessagePack or JSON by the first byte. It returns nil if the payload is empty or may be either: JSON begins with
// an ASCII character, and a MessagePack value that begins with a byte below 0x80 is an integer of that one byte.
func sniff(data []byte) Codec {
	switch {
	case len(data) > 0 && data[0] >= 0x80:
		return MsgPack
	case len(data) > 1:
		return JSON
	default:
		return nil
	}
}

// maxDepth bounds the nesting of MessagePack, because the decoder recurses: a payload with one byte per level could overflow the
// stack.
const maxDepth = 128

var (
	errShort = errors.New("msgpack: the payload ends in the middle of a value")
	errDeep  = fmt.Errorf("msgpack: nested deeper than %d levels", maxDepth)
)

// checkMsgPack returns an error unless data is exactly one well-formed value. It does not allocate. It is needed because msgpack
// v5 trusts the lengths that it reads: five bytes can make it allocate millions of elements.
func checkMsgPack(data []byte) error {
	rest, err := skipMsgPack(data, 0)
	if err == nil && len(rest) > 0 {
		return fmt.Errorf("msgpack: %d bytes left over after the value", len(rest))
	}
	return err
}

// skipMsgPack returns the bytes after the first value of b. The format is described in
// https://github.com/msgpack/msgpack/blob/master/spec.md
func skipMsgPack(b []byte, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, errDeep
	}
	if len(b) == 0 {
		return nil, errShort
	}
	c := b[0]
	b = b[1:]
	var size, children uint64 // the bytes of the value itself, and the values nested in it
	switch {
	case c < 0x80 || c >= 0xe0: // small integer
	case c < 0x90:
		children = 2 * uint64(c&0x0f)
	case c < 0xa0:
		children = uint64(c & 0x0f)
	case c < 0xc0:
		size = uint64(c & 0x1f)
	case c == 0xc1:
		return nil, errors.New("msgpack: no value begins with the byte 0xc1")
	default:
		f := msgpackFormats[c-0xc0]
		if len(b) < int(f.length) {
			return nil, errShort
		}
		var n uint64
		switch f.length {
		case 1:
			n = uint64(b[0])
		case 2:
			n = uint64(binary.BigEndian.Uint16(b))
		case 4:
			n = uint64(binary.BigEndian.Uint32(b))
		}
		b = b[f.length:]
		size, children = uint64(f.size), n*uint64(f.children)
		if f.children == 0 {
			size += n
		}
	}
	if size > uint64(len(b)) || children > uint64(len(b))-size {
		return nil, errShort
	}
	b = b[size:]
	for ; children > 0; children-- {
		var err error
		if b, err = skipMsgPack(b, depth+1); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// msgpackFormats describes the values that begin with 0xc0 to 0xdf. length is the number of bytes that hold the value's length n,
// size is the number of bytes besides them, and the value has n times children nested values. If children is 0, n counts bytes.
var msgpackFormats = [32]struct{ length, size, children uint8 }{
	0x00: {}, 0x02: {}, 0x03: {}, // nil, false, true
	0x04: {length: 1}, 0x05: {length: 2}, 0x06: {length: 4}, // bin
	0x07: {length: 1, size: 1}, 0x08: {length: 2, size: 1}, 0x09: {length: 4, size: 1}, // ext
	0x0a: {size: 4}, 0x0b: {size: 8}, // float
	0x0c: {size: 1}, 0x0d: {size: 2}, 0x0e: {size: 4}, 0x0f: {size: 8}, // uint
	0x10: {size: 1}, 0x11: {size: 2}, 0x12: {size: 4}, 0x13: {size: 8}, // int
	0x14: {size: 2}, 0x15: {size: 3}, 0x16: {size: 5}, 0x17: {size: 9}, 0x18: {size: 17}, // fixext
	0x19: {length: 1}, 0x1a: {length: 2}, 0x1b: {length: 4}, // str
	0x1c: {length: 2, children: 1}, 0x1d: {length: 4, children: 1}, // array
	0x1e: {length: 2, children: 2}, 0x1f: {length: 4, children: 2}, // map
}
